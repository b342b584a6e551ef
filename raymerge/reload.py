"""What a user does with a saved checkpoint, in a process of its own: load it with transformers alone, run it, generate.

Run as `python -P -m raymerge.reload FOLDER WORK PARENT` by `proof`, the process PARENT; nothing of raymerge is used, so
that what is found is what any reader of the folder finds - but for Gemma 2 in transformers before 5.22, whose default
attention leaves the softcap out, of unmerged models too: it is loaded with the attention that has it. WORK/request.json
holds the prompts; logits and generated text are left there.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def reload(folder: str, work: Path) -> None:
    """Write WORK/logits.safetensors ("0", "1", … each (T, vocabulary) float32) and WORK/result.json.

    Weights are loaded in the dtype asked for ("auto": what the folder's config says). Logits are computed from them in
    float32; tokens are generated greedily in their own dtype.
    """
    import transformers
    from transformers import AutoTokenizer, GenerationConfig

    request = json.loads((work / "request.json").read_text(encoding="utf-8"))
    trust: dict[str, Any] = {"trust_remote_code": request["trust_remote_code"]}
    options = trust | ({"attn_implementation": request["attention"]} if request["attention"] else {})
    # (model, report); its annotation knows nothing of output_loading_info.
    loaded: Any = getattr(transformers, request["class"]).from_pretrained(
        folder, dtype=request["dtype"], output_loading_info=True, **options
    )
    model, report = loaded
    result: dict[str, Any] = {"problems": {kind: sorted(map(str, names)) for kind, names in report.items() if names}}
    tokenizer = None
    if request["texts"] is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
        result["ids"] = [tokenizer(text)["input_ids"] for text in request["texts"]]
    model.eval()
    # The base's own, which is copied as it is, may ask for what greedy tokens have no use for: stop strings, several
    # sequences, a search whose code is on the hub.
    model.generation_config = GenerationConfig()
    with torch.inference_mode():
        first = torch.tensor(request["ids"][0])[None]
        count = request["new_tokens"]
        generated = model.generate(
            first,
            attention_mask=torch.ones_like(first),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
        )[0, first.shape[1] :].tolist()
        result["generated_ids"] = generated
        result["generated_text"] = None if tokenizer is None else tokenizer.decode(generated)
        _compute_in_float32(model)
        logits = {
            str(number): model(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0].float().contiguous()
            for number, ids in enumerate(request["ids"])
        }
    save_file(logits, work / "logits.safetensors")
    unit = 1 if sys.platform == "darwin" else 1024
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    (work / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _compute_in_float32(model: torch.nn.Module) -> None:
    """Convert each module's own weights while it runs and no longer, so that one matrix at a time is held twice."""

    def widen(module: torch.nn.Module, _: object) -> None:
        module.__dict__["_stored"] = stored = {n: p.data for n, p in module.named_parameters(recurse=False)}
        for name, data in stored.items():
            getattr(module, name).data = data.float()

    def restore(module: torch.nn.Module, *_: object) -> None:
        for name, data in module.__dict__.pop("_stored").items():
            getattr(module, name).data = data

    for module in model.modules():
        if (scale := getattr(module, "scalar_embed_scale", None)) is not None:
            # Gemma's, which no file holds: it was made in the stored dtype, and sqrt(d) rounded is no weight of ours.
            module.embed_scale = torch.tensor(scale, dtype=torch.float32)
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(restore)


def _end_with(parent: int) -> None:
    """End when the process that waits for what is found has been killed or stopped: a large model fills a machine."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(int(sys.argv[3]),), daemon=True).start()
    reload(sys.argv[1], Path(sys.argv[2]))
