"""The model families, one file each; radhpc/core/families.py lists them."""
