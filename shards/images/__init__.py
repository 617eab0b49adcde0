"""Raw images (JPEG, PNG, DICOM) to what lies in a shard, and perceptual hashes."""
