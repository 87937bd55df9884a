"""FX passes, one a file; the ordered list of them is the compiler."""
