"""Groups of MMLU's subjects under one name: the published domains, MMLU's own categories, and a user's (layer 0)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: The subsets whose layer similarities the method compares (seed 002).
DOMAINS: dict[str, tuple[str, ...]] = {
    "medical": ("clinical_knowledge", "professional_medicine"),
    "legal": ("professional_law", "international_law"),
    "math": ("high_school_mathematics", "college_mathematics"),
    "cs": ("computer_security", "machine_learning"),
    "humanities": ("world_religions", "philosophy"),
}

#: MMLU's four categories of its subjects (https://github.com/hendrycks/test, categories.py), under the names that
#: lm-evaluation-harness gives these groups; there, anatomy is in mmlu_stem.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "mmlu_stem": (
        "abstract_algebra", "astronomy", "college_biology", "college_chemistry", "college_computer_science",
        "college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering",
        "elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
        "high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning",
    ),
    "mmlu_humanities": (
        "formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history",
        "international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios", "philosophy",
        "prehistory", "professional_law", "world_religions",
    ),
    "mmlu_social_sciences": (
        "econometrics", "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics",
        "high_school_microeconomics", "high_school_psychology", "human_sexuality", "professional_psychology",
        "public_relations", "security_studies", "sociology", "us_foreign_policy",
    ),
    "mmlu_other": (
        "anatomy", "business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging",
        "management", "marketing", "medical_genetics", "miscellaneous", "nutrition", "professional_accounting",
        "professional_medicine", "virology",
    ),
}  # fmt: skip

#: The category of each subject.
CATEGORY_OF: dict[str, str] = {subject: name for name, members in CATEGORIES.items() for subject in members}


def known_domains(domains: Mapping[str, Sequence[str]] | None = None) -> dict[str, Sequence[str]]:
    """The subjects of each domain: `DOMAINS`, `CATEGORIES`, and others, which go before those of the same name."""
    return {**DOMAINS, **CATEGORIES, **(domains or {})}
