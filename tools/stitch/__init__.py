"""What tools/extract.py is made of: reading notebooks, the book's rules, the text of one program, its tracebacks."""
