"""Files that appear whole, and object stores."""
