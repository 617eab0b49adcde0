"""Raw images (JPEG, PNG, DICOM) to members of a shard, and perceptual hashes.

Lowest first: raw_image.py; windowing.py, blank.py, jpeg.py and png.py; dicom.py; decoding.py, which recognises a
file's kind; encoding.py.
"""
