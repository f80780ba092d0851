"""What a reader's cells and commands call: stitch, launch, execute, check, draw."""
