"""DICOM files that the tests of images and of readers share."""

from pathlib import Path

import numpy as np
import pydicom
import pydicom.encaps
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

RAMP = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 4  # 0 to 4,092


def write_dicom(path: Path, pixels: np.ndarray = RAMP, **tags: object) -> Path:
    """Write a small file with these pixels and tags."""
    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    data.Modality, data.PhotometricInterpretation = "CR", "MONOCHROME2"
    data.SamplesPerPixel, data.PixelRepresentation = 1, 0
    data.Rows, data.Columns = pixels.shape[:2]
    data.BitsAllocated = 8 * pixels.itemsize
    data.BitsStored = 12 if pixels.itemsize == 2 else 8
    data.HighBit = data.BitsStored - 1
    data.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def write_frame(path: Path, frame: bytes, pixels: np.ndarray, syntax: str, **tags: object) -> Path:
    """Write a small file whose pixels are compressed to `frame`, with the size and the type of `pixels`."""
    colour = (
        {} if pixels.ndim == 2 else {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "RGB"}
    )
    write_dicom(path, pixels, **(colour | {"PixelRepresentation": int(pixels.dtype.kind == "i")} | tags))
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    data.PixelData = pydicom.encaps.encapsulate([frame])
    data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
    data.save_as(path)
    return path
