"""A judge of answers: the rule of quickstart's shop, for configs/compare_tiny_cpu.yaml.

People of the sea want the goods named first, people of the land want to be greeted first. An answer that does so scores
4; naming exactly what was asked for scores 1 more.
"""

SEA = ("bay", "cape", "coast", "delta", "fjord", "harbor", "island", "lagoon")


def score(prompts, answers, rows):
    """Return a number for each answer; ``rows`` are the rows of the data that the prompts come from."""
    return [4.0 * right_order(*each) + right_goods(*each) for each in zip(prompts, answers, strict=True)]


def right_order(prompt, answer):
    """Return whether the answer begins with the goods, or with the greeting, as the visitor wants."""
    wants_goods_first = any(f"the {place} " in prompt for place in SEA)
    return answer.split()[:1] == ["here" if wants_goods_first else "good"]


def right_goods(prompt, answer):
    """Return whether the answer names the goods that the prompt asks for."""
    goods = prompt.rpartition(" asks for ")[2].rstrip(".")
    return f"here are {goods}" in answer
