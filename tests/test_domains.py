"""domains.py: the groups of subjects that have names."""

from raymerge.domains import CATEGORIES, CATEGORY_OF, DOMAINS, known_domains


def test_published_domains():
    assert list(DOMAINS) == ["medical", "legal", "math", "cs", "humanities"]
    assert sum(DOMAINS.values(), ()) == (
        "clinical_knowledge", "professional_medicine", "professional_law", "international_law",
        "high_school_mathematics", "college_mathematics", "computer_security", "machine_learning",
        "world_religions", "philosophy",
    )  # fmt: skip


def test_the_categories_part_mmlu_s_subjects():
    """As categories.py of the original code does; a few whose place may surprise, and the published sizes."""
    assert {name: len(members) for name, members in CATEGORIES.items()} == {
        "mmlu_stem": 18, "mmlu_humanities": 13, "mmlu_social_sciences": 12, "mmlu_other": 14,
    }  # fmt: skip
    assert len(CATEGORY_OF) == 57
    placed = ("computer_security", "econometrics", "business_ethics", "moral_scenarios", "anatomy")
    expected = ["mmlu_stem", "mmlu_social_sciences", "mmlu_other", "mmlu_humanities", "mmlu_other"]
    assert [CATEGORY_OF[subject] for subject in placed] == expected


def test_a_user_s_domain_goes_before_one_of_its_name():
    found = known_domains({"legal": ["contracts"], "mine": ["virology"]})
    assert found["legal"] == ["contracts"] and found["mine"] == ["virology"]
    assert found["mmlu_stem"] == CATEGORIES["mmlu_stem"] and list(DOMAINS) == list(found)[: len(DOMAINS)]
