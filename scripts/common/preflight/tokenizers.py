"""What the preflight asks of a tokenizer, its chat template and the configuration of its model: can training teach it
to stop?

Pure functions that return findings without a place; common/preflight/checks.py and stage 19 add the model's name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from common.preflight.finding import Finding, fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_MARK = re.compile(r"\{%-?\s*generation\b")
QUESTION = [{"role": "user", "content": "你好"}]
ANSWER = [{"role": "assistant", "content": "你也好"}]
SECOND = [{"role": "user", "content": "再见"}]


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, talks: bool = True, enable_thinking: bool = False
) -> list[Finding]:
    """pad and eos exist and differ, and the chat template ends the assistant's turn with eos and keeps what it wrote.

    talks: False for a classifier, which neither stops nor has turns.
    """
    found = []
    if tokenizer.pad_token_id is None:
        fix = "tokenizer.pad_token = '<|endoftext|>' (Qwen), then tokenizer.save_pretrained(...)"
        found.append(fault("the tokenizer has no pad token", fix, "error", "pad-token"))
    if not talks:
        return found
    if tokenizer.eos_token_id is None:
        fix = "tokenizer.eos_token = '<|im_end|>' (Qwen), then tokenizer.save_pretrained(...)"
        found.append(fault("the tokenizer has no eos token: the model cannot learn to stop", fix, "error", "eos-token"))
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        reason = f"pad and eos are the same token {tokenizer.eos_token}: masking pad hides every eos from the loss"
        found.append(
            fault(
                reason,
                "give pad a token of its own (Qwen: pad '<|endoftext|>', eos '<|im_end|>')",
                "error",
                "eos-token",
            )
        )
    if not tokenizer.chat_template:
        fix = "take the tokenizer of an instruct model, or set tokenizer.chat_template"
        found.append(fault("the tokenizer has no chat template", fix, "error", "chat-template"))
    elif tokenizer.eos_token is not None:
        found += _check_template(tokenizer, enable_thinking)
    return found


def _check_template(tokenizer: PreTrainedTokenizerBase, enable_thinking: bool) -> list[Finding]:
    options = {"tokenize": True, "return_dict": True, "enable_thinking": enable_thinking}
    marked = bool(GENERATION_MARK.search(tokenizer.chat_template))
    try:
        whole = tokenizer.apply_chat_template(QUESTION + ANSWER, return_assistant_tokens_mask=marked, **options)
        asked = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
        plain = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=False)
        answered = tokenizer.apply_chat_template(QUESTION + ANSWER, tokenize=False)
        turns = tokenizer.apply_chat_template(QUESTION + ANSWER + SECOND, tokenize=False)
    except Exception as error:  # a template may raise anything, jinja's own errors or Python's
        fix = "take the model's own template"
        return [fault(f"the chat template refuses a question and its answer: {error}", fix, "error", "chat-template")]

    found = []
    ids, mask = list(whole["input_ids"]), list(whole.get("assistant_masks", []))
    while ids and ids[-1] != tokenizer.eos_token_id and not tokenizer.decode(ids[-1:]).strip():
        ids.pop()  # a line end behind eos is layout
    if not ids or ids[-1] != tokenizer.eos_token_id:
        reason = f"the chat template does not end the assistant's turn with eos {tokenizer.eos_token}"
        found.append(
            fault(reason, "make eos the token that ends a turn (Qwen: '<|im_end|>')", "error", "chat-template")
        )
    elif marked and not mask[len(ids) - 1]:
        reason = f"the template's {{% generation %}} marks leave out eos {tokenizer.eos_token}: it is never trained"
        found.append(
            fault(reason, "put {% endgeneration %} behind the token that ends the turn", "error", "chat-template")
        )
    texts = [turn["content"] for turn in QUESTION + ANSWER + SECOND]
    if lost := [text for text in texts if text not in turns]:
        reason = f"the chat template leaves out {lost[0]!r}, a turn of a conversation of three"
        found.append(fault(reason, "take the model's own template", "error", "chat-template"))
    # Some templates write no header before an answer: there is nothing to ask for then.
    if asked == plain and not answered[len(asked) :].lstrip().startswith(ANSWER[0]["content"]):
        reason = "the chat template ignores add_generation_prompt: the model has to write the header of its own turn"
        found.append(
            fault(
                reason,
                "{% if add_generation_prompt %}, then the header of the assistant's turn",
                "error",
                "chat-template",
            )
        )
    return found


def check_model_files(model: str, max_length: int) -> list[Finding]:
    """What stands in the model's folder, before a stage sets right what it can: pad, eos and length, as other tools
    read them."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from common.models import turn_end

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        stop = turn_end(tokenizer)
    except Exception:
        return []  # load_tokenizer says so
    found = []
    here = "the stages here train with eos {eos} and another pad; tokenizer.save_pretrained(...) fixes the folder"
    fix = here.format(eos=stop)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        reason = (
            f"pad and eos are the same token {tokenizer.eos_token} in this folder: "
            "a trainer that masks pad hides every eos"
        )
        found.append(fault(f"{reason}, and the model never learns to stop", fix, "warning", "model-files"))
    if tokenizer.eos_token != stop:
        reason = f"eos is {tokenizer.eos_token} in this folder, but the template ends a turn with {stop}"
        found.append(fault(f"{reason}: other tools do not stop there", fix, "warning", "model-files"))

    stop_id = tokenizer.convert_tokens_to_ids(stop)
    try:
        generation = GenerationConfig.from_pretrained(model)
    except Exception:
        generation = None  # a folder of a tokenizer alone, or a model that has none
    if generation is not None and generation.eos_token_id is not None:
        stops = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
        if stop_id not in stops:
            reason = f"generation_config.json stops at {stops}, not at {stop} ({stop_id}), which ends a turn"
            found.append(
                fault(reason, f'"eos_token_id": {[stop_id, *stops]}; the stages here add it', "warning", "model-files")
            )
        if generation.pad_token_id == stop_id:
            reason = f"generation_config.json pads with {stop}, which ends a turn"
            found.append(
                fault(reason, '"pad_token_id": that of the tokenizer; the stages here set it', "warning", "model-files")
            )
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # transformers raises anything about a config that is none
        if (Path(model) / "config.json").exists():  # else a folder of a tokenizer alone
            reason = f"config.json describes no model ({' '.join(str(error).split())[:160]})"
            found.append(fault(reason, "copy it again", "error", "model-files"))
        return found
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and max_length > positions:
        reason = f"max_length {max_length} is more than the {positions} positions of the model"
        found.append(fault(reason, f"--max-length {positions}", "error", "model-files"))
    if len(tokenizer) > config.get_text_config().vocab_size:
        reason = (
            f"the tokenizer has {len(tokenizer)} tokens, the model {config.get_text_config().vocab_size} embeddings"
        )
        found.append(fault(reason, "take both from one folder", "error", "model-files"))
    return found
