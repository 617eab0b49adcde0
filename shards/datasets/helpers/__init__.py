"""Code that several readers share: layouts, labels, images and the tables of one archive."""
