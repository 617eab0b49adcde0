"""Replaces what presidio-analyzer finds in a list of texts by `___`: JSON in, JSON out, in an environment of its own.

python bench/privacy_texts/presidio_peer.py en_core_web_sm < texts.json
"""

import json
import sys

from presidio_analyzer import AnalyzerEngine
from presidio_analyzer.nlp_engine import NlpEngineProvider

MODELS = {"nlp_engine_name": "spacy", "models": [{"lang_code": "en", "model_name": sys.argv[1]}]}
engine = AnalyzerEngine(
    nlp_engine=NlpEngineProvider(nlp_configuration=MODELS).create_engine(), supported_languages=["en"]
)
cleaned = []
for text in json.load(sys.stdin):
    for entity in sorted(engine.analyze(text, language="en"), key=lambda entity: -entity.start):
        text = f"{text[: entity.start]}___{text[entity.end :]}"
    cleaned.append(text)
print(json.dumps(cleaned))
