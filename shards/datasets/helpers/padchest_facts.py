"""Facts about PadChest beyond its table: its labels, their counterparts in CheXpert, and the broken images.

PadChest (Bustos et al., 2020, arXiv:1901.07441) labels with 174 radiographic findings and 19 differential diagnoses.
The names below are the 193 that occur in its table of 2019-02-01. They are the key, not the CUIs beside them: dozens
of findings, laminar atelectasis among them, have no CUI there, and an empty name always has an empty CUI.

CheXpert's fourteen (Irvin et al., 2019, arXiv:1901.07031) are reached by the parent relations of PadChest's own tree
(a laminar atelectasis is an atelectasis). Like CheXpert's labeller, it marks what is mentioned: a parent of
CheXpert's tree does not follow from its child, so that cardiomegaly alone is no enlarged cardiomediastinum. What may
mean several things has no counterpart: costophrenic angle blunting (fluid or scar), fissure thickening (fluid or
pleura), heart insufficiency, kerley lines and congestion (with or without edema), granulomas, a mass anywhere, a
compressed vertebra, implants that support nothing.
"""

from collections.abc import Collection

from radhpc.core.sample import CHEXPERT

# Each of CheXpert's names with PadChest's that say it. A name may stand under two.
COUNTERPARTS: dict[str, tuple[str, ...]] = {
    "No Finding": ("normal",),
    "Enlarged Cardiomediastinum": ("mediastinal enlargement", "superior mediastinal enlargement"),
    "Cardiomegaly": ("cardiomegaly",),
    "Lung Opacity": (
        "infiltrates", "interstitial pattern", "ground glass pattern", "reticular interstitial pattern",
        "reticulonodular interstitial pattern", "miliary opacities", "alveolar pattern", "consolidation",
        "air bronchogram", "increased density",
    ),
    "Lung Lesion": ("nodule", "multiple nodules", "pulmonary mass", "lung metastasis", "lepidic adenocarcinoma",
                    "cavitation"),
    "Edema": ("pulmonary edema",),
    "Consolidation": ("consolidation",),
    "Pneumonia": ("pneumonia", "atypical pneumonia"),
    "Atelectasis": (
        "atelectasis", "atelectasis basal", "laminar atelectasis", "lobar atelectasis", "round atelectasis",
        "segmental atelectasis", "total atelectasis",
    ),
    "Pneumothorax": ("pneumothorax", "hydropneumothorax"),
    "Pleural Effusion": (
        "pleural effusion", "loculated pleural effusion", "loculated fissural effusion", "hydropneumothorax", "empyema",
    ),
    "Pleural Other": (
        "pleural thickening", "apical pleural thickening", "calcified pleural thickening", "pleural plaques",
        "calcified pleural plaques", "pleural mass",
    ),
    "Fracture": (
        "fracture", "callus rib fracture", "clavicle fracture", "humeral fracture", "rib fracture",
        "vertebral fracture",
    ),
    "Support Devices": (
        "NSG tube", "endotracheal tube", "tracheostomy tube", "chest drain tube", "gastrostomy tube",
        "nephrostomy tube", "ventriculoperitoneal drain tube", "catheter", "central venous catheter",
        "central venous catheter via jugular vein", "central venous catheter via subclavian vein",
        "central venous catheter via umbilical vein", "reservoir central venous catheter", "electrical device",
        "pacemaker", "single chamber device", "dual chamber device", "dai", "artificial heart valve",
        "artificial aortic heart valve", "artificial mitral heart valve",
    ),
}  # fmt: skip

# About the study, not about the patient; `exclude` is the dataset's own word that a study is not to be used.
EXCLUDE = "exclude"
REMARKS = (EXCLUDE, "suboptimal study", "unchanged")

# Those without a sure counterpart: radiographic findings, then differential diagnoses.
WITHOUT = (
    "Chilaiditi sign", "abnormal foreign body", "abscess", "adenopathy", "air fluid level", "air trapping",
    "aortic aneurysm", "aortic atheromatosis", "aortic button enlargement", "aortic elongation",
    "aortic endoprosthesis", "ascendent aortic elongation", "axial hyperostosis", "azygoesophageal recess shift",
    "azygos lobe", "blastic bone lesion", "bone cement", "breast mass", "bronchiectasis", "bronchovascular markings",
    "bullas", "calcified adenopathy", "calcified densities", "calcified fibroadenoma", "calcified granuloma",
    "calcified mediastinal adenopathy", "central vascular redistribution", "cervical rib", "chronic changes",
    "costochondral junction hypertrophy", "costophrenic angle blunting", "cyst", "descendent aortic elongation",
    "dextrocardia", "diaphragmatic eventration", "double J stent", "end on vessel", "endoprosthesis",
    "esophagic dilatation", "external foreign body", "fibrotic band", "fissure thickening", "flattened diaphragm",
    "goiter", "granuloma", "gynecomastia", "heart valve calcified", "hemidiaphragm elevation", "hiatal hernia",
    "hilar congestion", "hilar enlargement", "humeral prosthesis", "hyperinflated lung", "hypoexpansion",
    "hypoexpansion basal", "kerley lines", "kyphosis", "lipomatosis", "lung vascular paucity", "lytic bone lesion",
    "major fissure thickening", "mammary prosthesis", "mass", "mastectomy", "mediastinal mass", "mediastinal shift",
    "mediastinic lipomatosis", "metal", "minor fissure thickening", "nipple shadow",
    "non axial articular degenerative changes", "obesity", "osteopenia", "osteoporosis", "osteosynthesis material",
    "pectum carinatum", "pectum excavatum", "pericardial effusion", "pneumomediastinum", "pneumoperitoneo",
    "prosthesis", "pseudonodule", "pulmonary artery enlargement", "right sided aortic arch", "sclerotic bone lesion",
    "scoliosis", "soft tissue mass", "sternoclavicular junction hypertrophy", "sternotomy",
    "subacromial space narrowing", "subcutaneous emphysema", "supra aortic elongation", "surgery", "surgery breast",
    "surgery heart", "surgery humeral", "surgery lung", "surgery neck", "suture material", "thoracic cage deformation",
    "tracheal shift", "vascular hilar enlargement", "vascular redistribution", "vertebral anterior compression",
    "vertebral compression", "vertebral degenerative changes", "volume loss",
    "COPD signs", "asbestosis signs", "bone metastasis", "emphysema", "heart insufficiency",
    "lymphangitis carcinomatosa", "post radiotherapy changes", "pulmonary artery hypertension", "pulmonary fibrosis",
    "pulmonary hypertension", "pulmonary venous hypertension", "respiratory distress", "tuberculosis",
    "tuberculosis sequelae",
)  # fmt: skip

PATHOLOGIES = tuple(name for name in CHEXPERT if name not in ("No Finding", "Support Devices"))

_MEANING = {
    name: tuple(ours for ours, theirs in COUNTERPARTS.items() if name in theirs)
    for names in COUNTERPARTS.values()
    for name in names
}
_NOT_ABNORMAL = frozenset({"normal", *REMARKS, *COUNTERPARTS["Support Devices"]})

KNOWN = frozenset({*_MEANING, *REMARKS, *WITHOUT})

# Images that nobody can read: 11 of unstated cause, 2 with a broken chunk, 8 cut short. The list is that of
# torchxrayvision 1.5.7, datasets.py, PC_Dataset.
UNUSABLE = frozenset(
    {
        "216840111366964012283393834152009033102258826_00-059-087.png",
        "216840111366964012339356563862009072111404053_00-043-192.png",
        "216840111366964012373310883942009117084022290_00-064-025.png",
        "216840111366964012373310883942009152114636712_00-102-045.png",
        "216840111366964012373310883942009170084120009_00-097-074.png",
        "216840111366964012487858717522009280135853083_00-075-001.png",
        "216840111366964012558082906712009327122220177_00-102-064.png",
        "216840111366964012819207061112010281134410801_00-129-131.png",
        "216840111366964012819207061112010306085429121_04-020-102.png",
        "216840111366964012819207061112010307142602253_04-014-084.png",
        "216840111366964012819207061112010315104455352_04-024-184.png",
        "216840111366964012959786098432011033083840143_00-176-115.png",
        "216840111366964012989926673512011074122523403_00-163-058.png",
        "216840111366964012989926673512011083134050913_00-168-009.png",
        "216840111366964012989926673512011151082430686_00-157-045.png",
        "216840111366964013076187734852011291090445391_00-196-188.png",
        "216840111366964013590140476722013043111952381_02-065-198.png",
        "216840111366964013590140476722013058110301622_02-056-111.png",
        "216840111366964013686042548532013208193054515_02-026-007.png",
        "216840111366964013829543166512013353113303615_02-092-190.png",
        "216840111366964013962490064942014134093945580_01-178-104.png",
    }
)


def chexpert(names: Collection[str]) -> dict[str, int | None]:
    """CheXpert's fourteen by name, from the labels of a study: 1 present, 0 absent, None unsaid.

    PadChest lists what is there, so absence follows from `normal` alone: with nothing beside it but remarks and
    devices it is No Finding, and the twelve pathologies are absent. No Finding is absent where one of them is there.
    """
    values: dict[str, int | None] = dict.fromkeys(CHEXPERT)
    for name in names:
        for ours in _MEANING.get(name, ()):
            values[ours] = 1
    if values["No Finding"] and _NOT_ABNORMAL.issuperset(names):
        values.update(dict.fromkeys(PATHOLOGIES, 0))
    else:
        values["No Finding"] = 0 if any(values[name] for name in PATHOLOGIES) else None
    return values
