"""Banded attention with a global token, and a finetuning step around it, against transformers' Longformer.

    python tests/benchmarks/bench_attention.py

*attention*: projections, scores, dropout .1, forward and backward, four sequences of 1,024 tokens. *step*: forward,
backward and AdamW of RecFormer `mini` (6 x 256) on histories of 3 items or more of about 41 tokens, cut at 1,024,
scored against 5,000 items; the library reads them padded to the longest. Both sides have the same weights and, without
dropout, the same loss. Window 64, fp32.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

from _ratio import Contender, interleave, machine, median_ratio, serve, versions_of

TOKENS, SEQUENCES, WINDOW, HISTORIES, ITEMS, ROUNDS = 1024, 4, 64, 8, 5000, 3
WIDTHS = {"attention 384": 384, "attention 768": 768}  # 12 heads each


def longformer(width: int, heads: int, layers: int, **settings):
    from transformers import LongformerConfig

    return LongformerConfig(
        hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers, attention_window=[WINDOW] * layers,
        pad_token_id=1, **settings,
    )  # fmt: skip


class Theirs:
    """transformers' layer and model, on padded blocks."""

    def __init__(self, torch):
        from transformers.models.longformer.modeling_longformer import LongformerModel, LongformerSelfAttention

        self.torch = torch
        torch.manual_seed(0)
        self.layers = {name: LongformerSelfAttention(longformer(width, 12, 1), 0) for name, width in WIDTHS.items()}
        self.config = longformer(
            256, 4, 6, vocab_size=30_000, intermediate_size=1024, max_position_embeddings=1026, type_vocab_size=1
        )
        self.model = LongformerModel(self.config, add_pooling_layer=False)
        self.item_positions = torch.nn.Embedding(51, 256)
        self.item_table = torch.nn.functional.normalize(torch.randn(ITEMS, 256), dim=1)
        self.hidden = {
            name: torch.randn(SEQUENCES, TOKENS, width, requires_grad=True) for name, width in WIDTHS.items()
        }
        # three items and some more, about nine in the mean
        items = 3 + torch.empty(HISTORIES).exponential_(1 / 6).long()
        self.lengths = (1 + 41 * items).clamp(max=TOKENS)
        self.tokens = torch.randint(5, 30_000, (int(self.lengths.sum()),))
        self.positions = torch.cat([((torch.arange(n) + 40) // 41).clamp(max=50) for n in self.lengths.tolist()])
        self.targets = torch.randint(0, ITEMS, (HISTORIES,))
        self.prepare()
        parameters = [parameter for model in self.trained() for parameter in model.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=5e-5)
        with torch.no_grad():
            self.result = {"tokens": len(self.tokens), "loss": self.loss().item()}
        for model in (*self.layers.values(), *self.trained()):
            model.train()

    def prepare(self):
        self.model.eval()
        self.real = self.torch.arange(int(self.lengths.max())) < self.lengths[:, None]

    def trained(self):
        return self.model, self.item_positions

    def works(self):
        attentions = {name: lambda name=name: self.attend(name) for name in WIDTHS}
        return attentions | {"step": self.step}

    def attend(self, name: str) -> dict:
        mask = self.torch.zeros(SEQUENCES, TOKENS)
        mask[:, 0] = 10_000
        self.layers[name](self.hidden[name], mask, mask < 0, mask > 0, True)[0].sum().backward()
        return self.result

    def encode(self):
        tokens, positions = self.torch.ones(self.real.shape).long(), self.torch.zeros(self.real.shape).long()
        tokens[self.real], positions[self.real] = self.tokens, self.positions
        embedded = self.model.get_input_embeddings()(tokens) + self.item_positions(positions)
        first = self.torch.zeros_like(tokens)
        first[:, 0] = 1
        ids = 2 + self.torch.arange(tokens.shape[1]).expand_as(tokens)
        outputs = self.model(
            inputs_embeds=embedded, attention_mask=self.real.long(), global_attention_mask=first, position_ids=ids
        )
        return outputs.last_hidden_state[:, 0]

    def loss(self):
        users = self.torch.nn.functional.normalize(self.encode(), dim=1)
        return self.torch.nn.functional.cross_entropy(users @ self.item_table.T / 0.05, self.targets)

    def step(self) -> dict:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
        return self.result


class Ours(Theirs):
    """The same weights, on packed tokens."""

    def prepare(self):
        from textrec.models.attention import BandedAttention, BandLayout
        from textrec.models.pretrained import adapt_weights, config_from

        # one layout serves all layers of a model, as the library's mask does
        self.layout = BandLayout.of(self.torch.full((SEQUENCES,), TOKENS), WINDOW, 12)
        for name, theirs in self.layers.items():
            self.layers[name] = BandedAttention(WIDTHS[name], 12)
            self.layers[name].load_state_dict(theirs.state_dict())
        self.encoder = adapt_weights(self.model.state_dict(), config_from(self.config.to_dict())).encoder
        self.encoder.item_position_table.load_state_dict(self.item_positions.state_dict())

    def trained(self):
        return (self.encoder,)

    def attend(self, name: str) -> dict:
        self.layers[name](self.hidden[name].flatten(0, 1), self.layout).sum().backward()
        return self.result

    def encode(self):
        return self.encoder.encode(self.tokens, self.torch.zeros_like(self.tokens), self.positions, self.lengths)


CONTENDERS = {"ours": Ours, "transformers": Theirs}


def work(name: str) -> None:
    import torch

    torch.set_num_threads(1)
    serve(CONTENDERS[name](torch).works())


def main() -> None:
    versions = versions_of(sys.executable, ["torch", "transformers"])
    print(f"# Banded attention\n\n{machine()}, one thread.")
    print(", ".join(f"{name} {version}" for name, version in versions.items()), end=".\n\n")
    contenders = [
        Contender(name, [sys.executable, __file__, "--worker", name], {"OMP_NUM_THREADS": "1"}) for name in CONTENDERS
    ]
    works = [*WIDTHS, "step"]
    with tempfile.TemporaryDirectory() as folder:
        interleave(contenders, works, ROUNDS, Path(folder))
    first, second = (each.runs["step"][0]["result"] for each in contenders)
    if not math.isclose(first["loss"], second["loss"], abs_tol=1e-3):
        raise SystemExit(f"these are two models: loss {first['loss']} and {second['loss']}")
    print(
        f"Attention: forward and backward of {SEQUENCES} x {TOKENS} tokens, 12 heads, dropout .1; its width is named."
    )
    print(f"Step: RecFormer mini, {HISTORIES} histories of {first['tokens']} tokens together, loss {first['loss']:.4f}")
    print("on both sides without dropout.")
    print(f"Medians of {ROUNDS} interleaved rounds; memory is the peak above what was resident before.\n")
    print("| work | by | CPU ms | peak MiB | times ours, CPU | times ours, memory |")
    print("|---|---|--:|--:|--:|--:|")
    for name in works:
        for each in contenders:
            cpu, peak = each.median(name, "cpu") * 1e3, each.median(name, "peak_mib")
            ratios = (median_ratio(each, contenders[0], name, quantity) for quantity in ("cpu", "peak_mib"))
            print(f"| {name} | {each.name} | {cpu:,.0f} | {peak:,.0f} |", *(f"{ratio:.2f} |" for ratio in ratios))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", choices=CONTENDERS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
    else:
        main()
