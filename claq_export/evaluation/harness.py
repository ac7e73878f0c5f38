"""EleutherAI's lm-evaluation-harness on anything that gives logits: artifacts, quantized modules, originals.

Needs the package ``lm-eval`` (``pip install lm-eval``); it is imported only when a function here is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from .models import LogitsModel, sequence_limit


def harness_model(model: LogitsModel, tokenizer: Any, max_length: int = 2048, max_new_tokens: int = 256) -> Any:
    """An ``lm_eval.api.model.LM`` that scores with ``model``; hand it to ``lm_eval.simple_evaluate(model=...)``.

    Args:
        model: gives the logits.
        tokenizer: a transformers tokenizer.
        max_length: tokens the model takes, fewer where it states a lower limit
            (:func:`~claq_export.evaluation.models.sequence_limit`); longer contexts lose their beginning, as the harness does it.
        max_new_tokens: bound for generation tasks that set none (greedy; every step runs the whole sequence).

    Raises:
        ConfigError: ``lm-eval`` is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError as error:
        raise ConfigError("this task needs EleutherAI's harness: pip install lm-eval") from error

    max_length = min(max_length, sequence_limit(model) or max_length)

    class HarnessModel(TemplateLM):
        """The harness's requests, answered one sequence at a time (no padding, hence exact)."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id

        @property
        def tokenizer_name(self) -> str:
            return str(tokenizer.name_or_path).replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return tokenizer(string, add_special_tokens=bool(add_special_tokens), verbose=False)["input_ids"]

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return [continuation_likelihood(model, context, target, max_length) for _, context, target in requests]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            sums = []
            for request in requests:
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=max_length,
                    context_len=1,
                )
                pairs = [make_disjoint_window(window) for window in windows]
                sums.append(sum(continuation_likelihood(model, c, t, max_length)[0] for c, t in pairs))
            return sums

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            answers = []
            for request in requests:
                context, options = request.args
                until = options.get("until") or []
                stops = [until] if isinstance(until, str) else list(until)
                steps = int(options.get("max_gen_toks", max_new_tokens))
                answers.append(_greedy(model, tokenizer, self.tok_encode(context), stops, steps, max_length))
            return answers

    return HarnessModel()


def continuation_likelihood(
    model: LogitsModel, context: Sequence[int], target: Sequence[int], max_length: int
) -> tuple[float, bool]:
    """Log-likelihood of ``target`` after ``context`` (tokens), and whether each of its tokens is ranked first."""
    tokens = [*context, *target][-(max_length + 1) :]
    logits = model.logits(torch.tensor([tokens[:-1]]))[0, -len(target) :].float().cpu()
    wanted = torch.tensor(list(target))[-logits.shape[0] :]
    log_likelihood = -torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    return float(log_likelihood), bool((logits.argmax(-1) == wanted).all())


def _greedy(
    model: LogitsModel, tokenizer: Any, context: list[int], stops: Sequence[str], steps: int, max_length: int
) -> str:
    made: list[int] = []
    text = ""
    for _ in range(steps):
        tokens = [*context, *made][-max_length:]
        token = int(model.logits(torch.tensor([tokens]))[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        made.append(token)
        text = tokenizer.decode(made)
        found = [text.index(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)]
    return text


def run_harness(
    model: LogitsModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    max_length: int = 2048,
) -> dict[str, dict[str, float]]:
    """Run tasks of the harness.

    Args:
        model, tokenizer: under evaluation.
        tasks: names of tasks that the harness knows or that ``include_path`` defines.
        include_path: a folder with task definitions (YAML), for example :func:`write_lambada_task`'s.
        limit: items a task at most.
        max_length: see :func:`harness_model`.

    Returns:
        metric values by task.

    Raises:
        ConfigError: ``lm-eval`` is not installed, or it does not know a task.
    """
    adapter = harness_model(model, tokenizer, max_length)
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include_path) if include_path else None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"lm-evaluation-harness knows no task {unknown[0]!r}; --harness-path names a folder with definitions"
        )
    answer = lm_eval.simple_evaluate(
        model=adapter, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
    )
    return {
        task: {key.split(",")[0]: float(value) for key, value in values.items() if isinstance(value, (int, float))}
        for task, values in answer["results"].items()
    }


def write_lambada_task(folder: str | Path, data: str | Path, name: str = "lambada_local") -> Path:
    """Write a task definition equal to the harness's ``lambada_openai``, but reading a local JSONL file and without white space
    at the end of a passage, which would be its last word; returns its path."""
    path = Path(folder) / f"{name}.yaml"
    path.write_text(
        f"""task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {Path(data).resolve()}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.rstrip().split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.rstrip().split(' ')[-1]}}}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
""",
        encoding="utf-8",
    )
    return path
