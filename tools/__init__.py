"""The book's tools: stitch, launch, execute, measure."""
