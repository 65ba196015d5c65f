"""DiT: a class-conditional transformer. Its class table is replaced by a fresh one of ours, as a UNet's embedding is.

Each block holds a table of its own, all with the same values. A row's embedding is given in the place of its label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dp_lora.errors import InputError
from dp_lora.models.families.classes import ClassConditional
from dp_lora.models.families.family import Conditions, Family

if TYPE_CHECKING:
    from torch import Tensor

DROPOUT = 0.1  # diffusers' own for DiT; above 0 it gives the table a row for 'no class'


@dataclass(frozen=True)
class DiT(ClassConditional):
    part: str = "transformer"
    targets: tuple[str, ...] = Family.targets
    loading: tuple[str, ...] = (
        "from safetensors.torch import load_file",
        'rows = load_file(folder + "/class_embedding.safetensors")["weight"]',
        "for block in pipe.transformer.transformer_blocks:",
        "    block.norm1.emb.class_embedder.embedding_table.weight.data[: len(rows)] = rows",
    )

    def width(self, config: Mapping[str, Any]) -> int:
        return config["num_attention_heads"] * config["attention_head_dim"]

    def classes(self, config: Mapping[str, Any]) -> list[str]:
        # numbers: names are not unique there, hold commas, and are lost where a pipeline is saved again
        return [str(number) for number in range(config["num_embeds_ada_norm"])]

    def take_table(self, denoiser: Any, n_classes: int) -> Tensor:
        import torch

        embeddings = [block.norm1.emb for block in denoiser.transformer_blocks]
        tables = [one.class_embedder.embedding_table.weight.detach() for one in embeddings]
        if not tables[0].is_meta and not all(torch.equal(table, tables[0]) for table in tables):
            raise InputError("model.base: its blocks have class tables of their own; a DiT has one for all")
        for one in embeddings:
            one.class_embedder = torch.nn.Identity()
        return torch.cat([tables[0][:n_classes], tables[0][-1:]])

    def put_table(self, denoiser: Any, rows: Tensor) -> None:
        import torch
        from diffusers.models.embeddings import LabelEmbedding

        stated = denoiser.config["num_embeds_ada_norm"]
        # the pipeline takes the last row for 'no class'; rows that no class of ours uses are 'no class' too
        table = torch.cat([rows[:-1], rows[-1:].expand(stated + 2 - len(rows), -1)])
        for block in denoiser.transformer_blocks:
            embedder = LabelEmbedding(stated, rows.shape[1], DROPOUT)
            own = table.to(block.norm1.linear.weight, copy=True)  # a file of tensors holds no shared ones
            embedder.embedding_table.weight = torch.nn.Parameter(own, requires_grad=False)
            block.norm1.emb.class_embedder = embedder.eval()

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        embedded = conditions["context"][:, 0].to(x_t.dtype)
        both = denoiser(x_t, timestep=t, class_labels=embedded, return_dict=False)[0]
        return both[:, : x_t.shape[1]]  # the other half is the learned variance
