"""The table of model families in docs/models.md: ``python -m dpo_jax.models.families.docs``."""

from importlib import import_module

from dpo_jax.models.families import FAMILIES


def family_table() -> str:
    """Return the table in Markdown; the first line of a family's file gives its models' names and traits."""
    lines = ["| `model_type` | models | what sets them apart | class in `transformers` |", "|---|---|---|---|"]
    for model_type, family in FAMILIES.items():
        file = import_module(f"{__package__}.{model_type.removesuffix('_text')}")
        models, _, traits = (file.__doc__ or "").partition("\n")[0].rstrip(".").partition(": ")
        if family.carried:
            traits += "; other parts, such as vision, are not computed: they pass unchanged to the export"
        lines.append(f"| `{model_type}` | {models} | {traits} | `{family.architecture}` |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(family_table(), end="")
