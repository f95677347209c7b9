"""Text embedders: whatever sentence-transformers loads, with its own pooling and prompts, and histories of its vectors.

Two sides are read, histories as queries and items as documents, each with the prompt that the model's folder names or
the caller gives. The published experiment is kept as two sides of its own: it pools items and histories differently.

B texts of a batch · L padded length · T real positions · D width · I items + 1, row 0 padding
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textrec.models.pretrained import find_pretrained
from textrec.models.sequence_model import Layout, SequenceModel, newest
from textrec.schema import PADDING_ID, InputError

POOLINGS = ("own", "first", "mean", "last", "pooler")
USERS = ("mean", "recency_weighted", "last_item")


class TextEncoder(nn.Module):
    """An embedder whose vectors are of unit norm.

    `sides` says how it reads: as `query`, as `document`, or as the published code did (a mean over a history's tokens,
    BERT's pooler for an item). `max_tokens` may lower the model's own limit, special tokens and prompt included.
    """

    def __init__(
        self, name_or_path: str | Path, *, device: str = "cpu", max_tokens: int | None = None, dtype: str = "float32",
        pooling: str = "own", query_prompt: str | None = None, document_prompt: str | None = None,
    ):  # fmt: skip
        """Load a folder, a hub id or MiniLM's package (see `find_pretrained`); prompts not given are the folder's.

        Raises `InputError` where there is no embedder of token ids, and for a pooling, dtype or limit it cannot have.
        """
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        super().__init__()
        self.identity = ""  # a hash of the weights and `config`, filled in by who needs one
        logging.disable_progress_bar()  # of weights that are read in a moment
        if pooling not in POOLINGS or dtype not in ("float32", "bfloat16", "float16"):
            raise InputError(f"pooling={pooling!r}, dtype={dtype!r}: expected one of {POOLINGS}, and a torch float")
        path, settings = find_pretrained(name_or_path), {"dtype": getattr(torch, dtype)}
        try:
            self.model = SentenceTransformer(
                str(path), device=device, model_kwargs=settings, local_files_only=True
            ).eval()
        except (OSError, ValueError) as error:
            raise InputError(f"{path} holds no text embedder: {str(error).splitlines()[0]}") from error
        if self.model.transformers_model is None:
            raise InputError(f"{path} reads no token ids: expected an embedder that starts with a transformer")
        positions = getattr(self.model.transformers_model.config, "max_position_embeddings", 1 << 30)
        limit = min(self.model.max_seq_length or positions, positions)
        self.max_tokens = limit if max_tokens is None else max_tokens
        if not 3 <= self.max_tokens <= limit:
            raise InputError(f"max_tokens={max_tokens}: expected 3 to {limit}, what {name_or_path} was made for")
        own = {name: text for name, text in self.model.prompts.items() if text}
        documents = [own[name] for name in ("document", "passage", "corpus") if name in own]
        prompts = {"query": own.get("query", ""), "document": documents[0] if documents else ""}
        for side, given in (("query", query_prompt), ("document", document_prompt)):
            prompts[side] = prompts[side] if given is None else given
        self.sides = {side: (pooling, prompt) for side, prompt in prompts.items()}
        self.sides |= {"published_history": ("mean", ""), "published_item": ("pooler", "")}
        tokenizer, unset = self.model.tokenizer, {"truncation": None, "padding": None}  # how it cuts is told elsewhere
        fast = getattr(tokenizer, "backend_tokenizer", None)
        rules = json.loads(fast.to_str()) | unset if fast else sorted(tokenizer.get_vocab().items())
        known = hashlib.sha256(repr(rules).encode()).hexdigest()
        self.config = {"modules": repr(self.model), "dtype": dtype, "tokenizer": known}  # what it is beside its weights

    def tokenize(self, texts: Sequence[str], side: str = "document") -> list[np.ndarray]:
        """Return the token ids of each text behind the side's prompt, special ones included, cut to `max_tokens`."""
        prompt = self.sides[side][1]
        how = {"truncation": True, "max_length": self.max_tokens, "return_attention_mask": False}
        read = self.model.tokenizer([prompt + text for text in texts], **how)["input_ids"]
        return [np.asarray(each, np.int32) for each in read]

    @torch.inference_mode()
    def encode(self, tokens_B: Sequence[np.ndarray], side: str = "document") -> np.ndarray:
        """Return the unit vectors (B, D), float32, of token arrays as `tokenize` makes them."""
        device, (pooling, prompt) = next(self.parameters()).device, self.sides[side]
        lengths_B = np.array([len(each) for each in tokens_B])
        real_BL = np.arange(max(lengths_B.max(), 1)) < lengths_B[:, None]
        ids_BL = np.full(real_BL.shape, self.model.tokenizer.pad_token_id or 0, np.int64)
        ids_BL[real_BL] = np.concatenate(tokens_B)
        features = {"input_ids": ids_BL, "attention_mask": real_BL.astype(np.int64)}
        features = {name: torch.from_numpy(values).to(device) for name, values in features.items()}
        if pooling == "own":
            if prompt:  # some poolings leave it out: its tokens, without a special one that ends them
                prompt_ids = self.model.tokenizer(prompt)["input_ids"]
                ends = prompt_ids[-1] in self.model.tokenizer.all_special_ids
                features["prompt_length"] = len(prompt_ids) - ends
            vectors_BD = self.model(features)["sentence_embedding"]
        else:
            read = self.model.transformers_model(**features)
            if pooling == "pooler" and getattr(read, "pooler_output", None) is None:
                raise InputError("pooling='pooler': this transformer has no pooler; expected a BERT")
            mask_BL1 = features["attention_mask"][:, :, None].to(read.last_hidden_state)
            vectors_BD = {
                "first": lambda: read.last_hidden_state[:, 0], "pooler": lambda: read.pooler_output,
                "last": lambda: read.last_hidden_state[range(len(lengths_B)), lengths_B - 1],
                "mean": lambda: (read.last_hidden_state * mask_BL1).sum(1) / mask_BL1.sum(1).clamp_min(1),
            }[pooling]()  # fmt: skip
        return F.normalize(vectors_BD.float(), dim=1).cpu().numpy()


def save_random_embedder(tokenizer, folder: Path, *, width: int = 32, max_tokens: int = 128, seed: int = 0) -> None:
    """Write a small BERT of random weights as an embedder, for runs without pretrained ones.

    `tokenizer` is one of `tokenizers` that knows <s> and <pad>, such as `train_tokenizer` makes.
    """
    from tokenizers import Tokenizer, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    start, pieces = ("<s>", tokenizer.token_to_id("<s>")), Tokenizer.from_str(tokenizer.to_str())
    pieces.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    special = {"cls_token": "<s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=pieces, model_max_length=max_tokens, **special).save_pretrained(folder)
    config = BertConfig(
        vocab_size=pieces.get_vocab_size(), hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=2 * width, max_position_embeddings=max_tokens, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)


@dataclass(frozen=True, kw_only=True)
class VectorModelConfig:
    """How given item vectors make a user's."""

    num_items: int
    embedding_dim: int  # D, of the given vectors
    user: str = "recency_weighted"  # mean | recency_weighted | last_item
    half_life: float = 3.0  # items after which a weight has halved: recency_weighted
    learned: bool = False  # a square matrix above the user vector; else nothing is trained
    scale: float = 20.0  # of the cosines, where a matrix is learned: RecFormer's temperature
    max_sequence_length: int = 50

    def __post_init__(self):
        if self.user not in USERS or self.half_life <= 0:
            raise InputError(f"user={self.user!r}, half_life={self.half_life}: expected one of {USERS}, and above 0")


class VectorModel(SequenceModel):
    """Users as weighted sums of the frozen unit vectors of their items; scores are cosines, or bilinear if learned."""

    config_class = VectorModelConfig

    def __init__(self, config: VectorModelConfig, items_ID: Tensor | None = None):
        super().__init__(config)
        empty = torch.zeros(config.num_items + 1, config.embedding_dim)
        unit = empty if items_ID is None else F.normalize(items_ID.float(), dim=1)
        self.item_table = nn.Parameter(unit, requires_grad=False)
        self.map = nn.Linear(config.embedding_dim, config.embedding_dim, bias=False) if config.learned else None
        if self.map is not None:
            nn.init.eye_(self.map.weight)

    def forward(self, items_BL: Tensor, times_BL: Tensor | None = None) -> Tensor:
        items_BL = newest(items_BL, self.config.max_sequence_length)
        layout = Layout.of(items_BL != PADDING_ID)
        block_BLD = layout.pad(self.item_table[items_BL[items_BL != PADDING_ID]])
        places_L = torch.arange(block_BLD.shape[1], device=block_BLD.device)
        ages_LL = (places_L[:, None] - places_L).to(block_BLD)
        rate = {"mean": 0.0, "recency_weighted": 1 / self.config.half_life, "last_item": 1e4}[self.config.user]
        weights_LL = (-rate * ages_LL).exp2().tril()  # an age of one and a rate of 1e4 leave nothing
        user_TD = F.normalize(layout.pack(weights_LL @ block_BLD), dim=1)
        return user_TD if self.map is None else self.config.scale * self.map(user_TD)

    def item_vectors(self) -> Tensor:
        return self.item_table
