"""MIMIC-CXR-JPG: 377,110 chest radiographs of 227,835 studies as JPEGs, with splits, projections and labels.

    --raw mimic-cxr-jpg/2.1.0/
      mimic-cxr-2.0.0-metadata.csv.gz    dicom_id,subject_id,study_id,...,ViewPosition,...
      mimic-cxr-2.0.0-split.csv.gz       dicom_id,study_id,subject_id,split
      files/p10/p10000032/s50414267/02aa804e-bde0afdd-112c0b34-7bc16630-4e384014.jpg

The reports come from MIMIC-CXR: mimic-cxr-reports.zip there or beside it, as it is or unpacked, or reports=PATH.
Labels: `chexpert` and `negbio` of the reports' labelers, `radiologist` of the 687 test studies of version 2.1.0.
Johnson et al., 2019, https://arxiv.org/abs/1901.07042.
"""

from collections.abc import Iterator
from pathlib import Path

from shards.datasets import reader
from shards.datasets.helpers import mimic
from shards.datasets.reader import RawStudy

SYNTHETIC = False
EDITION = mimic.Edition(images="metadata", names=mimic.table_names("metadata"), suffix=".jpg", complete=True)


class MimicCxrJpgOptions(mimic.MimicOptions):
    """mimic_cxr_jpg: chest radiographs with reports and labels."""


OPTIONS = MimicCxrJpgOptions


def read(raw: Path | None, options: reader.ReaderOptions) -> Iterator[RawStudy]:
    """Yield the studies. Raises UserError where a table, the images or the reports are not found."""
    assert isinstance(options, MimicCxrJpgOptions)
    return mimic.read_edition(raw, options, EDITION)
