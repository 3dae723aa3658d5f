"""What an embedding and a head in INT8 cost: the perplexity of a float model with one of them, and with both.

    python -m bench.head_bits CHECKPOINT

CHECKPOINT is a bf16 conversion (``atom-jax demo`` keeps one in its folder). Its linears stay in floating
point, so that nothing but the two tables differs. Writes bench/results/head_bits.json and the table in
docs/quantization.md.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from flax import nnx
from jaxtyping import Array, Float32, Int32

from atom_jax.checkpoint import TOKENIZER_FOLDER, Model, load
from atom_jax.config import ModelConfig
from atom_jax.embedding import Embedding, Table, head_table, round_table
from atom_jax.layers import head_logits, linear, linear_input
from atom_jax.llama import merge
from atom_jax.perplexity import exp_of_mean, hidden_in_chunks, make_windows, sum_nll
from bench.markdown import table_row, with_table
from bench.record import DOCS, environment, save
from convert.texts import load_texts

FLOAT = "both in bfloat16"
# Embedding in INT8, head in INT8, input of the head rounded once.
FORMS = {
    FLOAT: (False, False, False),
    "embedding in INT8": (True, False, False),
    "head in INT8": (False, True, False),
    "both in INT8": (True, True, False),
    "both, the head's input rounded once": (True, True, True),
}
PAGE = DOCS / "quantization.md"


@functools.partial(jax.jit, static_argnames=("config", "once"))
def window_loss(
    params: nnx.State,
    embedding: Embedding,
    head: Table,
    tokens: Int32[Array, "1 seq"],
    lengths: Int32[Array, " 1"],
    *,
    config: ModelConfig,
    once: bool,
) -> Float32[Array, ""]:
    """The summed loss (nats) of a window, with another embedding and head than the model's."""
    model = merge(params, config)
    model.embedding.set_value(embedding)

    def logits(hidden: Array) -> Array:
        if not once:
            return head_logits(hidden, head, config)
        return linear(linear_input(hidden, head, None, config), head, None, jnp.float32)

    return sum_nll(logits, hidden_in_chunks(model, tokens, lengths), tokens, lengths)


def measure(model: Model, tokens: Int32[Any, " tokens"]) -> dict[str, float]:
    """Perplexity of a text in windows of 512 tokens, by the name of the form."""
    assert isinstance(model.params, nnx.State), "on one device"
    embedding = merge(model.params, model.config).embedding.get_value()
    head = head_table({name: value.get_value() for name, value in model.params.items() if name != "layers"})
    embeddings = embedding, Embedding(round_table(jnp.asarray(embedding.table)), embedding.dtype)
    heads = head, round_table(jnp.asarray(head))
    windows, lengths = make_windows(tokens, config=model.config, seq_len=512, max_tokens=None)
    found = {}
    for form, (embedding_in_int8, head_in_int8, once) in FORMS.items():
        tables = embeddings[embedding_in_int8], heads[head_in_int8]
        rows = zip(windows[:, None], lengths[:, None], strict=True)
        loss = sum(
            float(window_loss(model.params, *tables, *row, config=model.config, once=once)) for row in rows
        )
        found[form] = exp_of_mean(loss, int((lengths - 1).sum()), form)
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Perplexity of each form on each text, and how much more it is than that of the float tables."""
    lines = [table_row("", *found), table_row("---", *["---:"] * len(found))]
    for form in FORMS:
        cells = [f"{text[form]:.3f} ({text[form] / text[FLOAT] - 1:+.2%})" for text in found.values()]
        lines.append(table_row(form, *cells))
    return "\n".join(lines) + "\n"


def main(
    checkpoint: Annotated[Path, typer.Argument(help="A bf16 conversion.")],
    num_tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 8192,
) -> None:
    before = environment()
    model = load(checkpoint)
    if model.config.format.head_bits != 16 or model.config.format.quantizes_linears:
        raise SystemExit(f"{checkpoint}: a bf16 conversion is needed, this is {model.config.format.scheme}")
    texts = load_texts([], checkpoint / TOKENIZER_FOLDER, num_tokens)
    found = {name: measure(model, tokens) for name, tokens in texts.items()}
    print(table(found))
    print(f"written to {save('head_bits', before, {'tokens': num_tokens, 'perplexity': found})}")
    PAGE.write_text(with_table(PAGE.read_text(), "head_bits", table(found)))


if __name__ == "__main__":
    typer.run(main)
