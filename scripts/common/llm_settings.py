"""Settings of the stages that ask an endpoint (13, 14, 15, 71): how it is asked, not what."""

from dataclasses import dataclass, fields


@dataclass
class AskSettings:
    concurrency: int = 16
    """requests under way at once"""
    max_tries: int = 10
    """per request: 429, 5xx, time-outs, lost connections and broken answers are tried again"""
    time_limit: float = 120.0
    """seconds for one try as a whole"""
    price_in: float = 0.0
    """per million prompt tokens, in any currency; of the dearer model, where there are two"""
    price_out: float = 0.0
    """per million answer tokens"""
    max_cost: float = 0.0
    """stop before the cost passes this, 0 = no limit"""
    max_total_tokens: int = 0
    """stop before prompt and answer tokens pass this, 0 = no limit"""
    max_failed: int = 0
    """requests that may stay without an answer; they are counted (13: left out; 14: the copy fails its round; 15: a
    rule takes its place; 71: an unparsed reply)"""
    dry_run: bool = False
    """print requests, tokens and cost; ask and write nothing"""


# what has no effect where nothing is asked: without a model, or where rules judge
ASKING = ("temperature", "top_p", "max_tokens", "extra_body", "guide_file", "prompts_dir", "prompt_versions", "control")
ASKING += tuple(field.name for field in fields(AskSettings) if field.name != "dry_run")
# for LLM.of(settings), and for begin_run(..., ignore=HOW_TO_ASK)
HOW_TO_ASK = ("request_log", *(field.name for field in fields(AskSettings)))
