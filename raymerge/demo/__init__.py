"""The embedded demo: a tiny Llama checkpoint, MMLU-format questions in three languages and a short text.

Everything here was made by `python -m raymerge.demo.build`; see `build.py` for the recipe and for what is held out.

- `MODEL_PATH`: folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load.
- `MMLU_PATH`: folder `{en,es,fr}/{dev,val,test}/SUBJECT_SPLIT.csv`, header-less rows `question,A,B,C,D,answer`.
- `TEXT_PATH`: UTF-8 plain text for perplexity.
"""

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "checkpoint"
MMLU_PATH = Path(__file__).parent / "mmlu"
TEXT_PATH = Path(__file__).parent / "text.txt"
