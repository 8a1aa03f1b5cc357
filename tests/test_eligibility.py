"""The filter before the router."""

from __future__ import annotations

import pytest

from composer.eligibility import Eligibility, check_exclude
from composer.errors import ContextTooLong, RequestError, Unsupported
from composer.prompting import PromptSpec
from composer.types import Expert, Sampling
from tests.fakes import request

EXPERTS = [
    Expert(id="plain", server="s", context_window=100, chars_per_token=1),
    Expert(
        id="tools", server="s", context_window=50, chars_per_token=1, abilities=frozenset({"tools"})
    ),
    Expert(id="long", server="s", context_window=10_000, chars_per_token=2),
]


def names(mask: object) -> list[str]:
    return [e.id for e, keep in zip(EXPERTS, mask, strict=True) if keep]  # type: ignore[call-overload]


def test_a_short_plain_request_may_go_anywhere() -> None:
    assert names(Eligibility.of(EXPERTS).mask(request("hi"))) == ["plain", "tools", "long"]


def test_abilities_narrow_the_choice() -> None:
    mask = Eligibility.of(EXPERTS).mask(request("hi", needs=frozenset({"tools"})))
    assert names(mask) == ["tools"]


def test_excluded_experts_are_left_out_and_those_of_other_policies_ignored() -> None:
    mask = Eligibility.of(EXPERTS).mask(request("hi", exclude=frozenset({"plain", "elsewhere"})))
    assert names(mask) == ["tools", "long"]


def test_an_excluded_id_that_nobody_has_is_refused_by_name() -> None:
    experts = {expert.id: expert for expert in EXPERTS}
    check_exclude(frozenset({"plain"}), experts)
    with pytest.raises(RequestError, match="there is no expert 'plane' to exclude") as refused:
        check_exclude(frozenset({"plain", "plane"}), experts)
    assert refused.value.param == "composer.exclude"


def test_parameters_narrow_the_choice_to_those_who_understand_all_of_them() -> None:
    experts = [
        Expert(id="none", server="s"),
        Expert(id="some", server="s", parameters=frozenset({"top_k"})),
        Expert(id="more", server="s", parameters=frozenset({"top_k", "min_p"})),
        Expert(id="other", server="s", parameters=frozenset({"ignore_eos"})),
    ]
    eligibility = Eligibility.of(experts)
    asked = request("hi", parameters=frozenset({"top_k"}))
    assert eligibility.mask(asked).tolist() == [False, True, True, False]
    asked = request("hi", parameters=frozenset({"top_k", "min_p"}))
    assert eligibility.mask(asked).tolist() == [False, False, True, False]
    for parameters, named in (({"cache_salt"}, "cache_salt"), ({"ignore_eos", "top_k"}, "top_k")):
        with pytest.raises(Unsupported, match=f"this policy can honour '{named}'") as refused:
            eligibility.mask(request("hi", parameters=frozenset(parameters)))
        assert refused.value.param == named


@pytest.mark.parametrize(
    ("chars", "max_tokens", "left"),
    [
        (99, None, ["plain", "long"]),
        (100, None, ["long"]),
        (90, 11, ["long"]),
        (49, 1, ["plain", "tools", "long"]),
    ],
)
def test_prompt_and_answer_should_fit_the_window(
    chars: int, max_tokens: int | None, left: list[str]
) -> None:
    asked = request("x" * chars, sampling=Sampling(max_tokens=max_tokens))
    assert names(Eligibility.of(EXPERTS).mask(asked)) == left


def test_nobody_is_refused_on_an_estimate() -> None:
    """30,000 characters are 15,000 tokens by the estimate, but could be fewer than 10,000."""
    assert names(Eligibility.of(EXPERTS).mask(request("x" * 30_000))) == ["long"]


def test_an_expert_with_a_template_reads_the_last_user_message_only() -> None:
    spec = PromptSpec.model_validate(
        {"extract": [{"regex": r"(?P<word>[a-z]+)$"}], "template": "up {word}"}
    )
    experts = [Expert(id="up", server="s", context_window=100, chars_per_token=1, prompt=spec)]
    long = {"role": "assistant", "content": "x" * 5_000}
    asked = request(messages=(long, {"role": "user", "content": "uppercase dog"}))
    assert Eligibility.of(experts).mask(asked).tolist() == [True]


def test_the_refusal_names_the_demand_that_left_nobody() -> None:
    eligibility = Eligibility.of(EXPERTS)
    with pytest.raises(Unsupported, match="no expert of this policy offers 'vision'") as vision:
        eligibility.mask(request("hi", needs=frozenset({"vision"})))
    assert vision.value.param == "messages"
    with pytest.raises(Unsupported, match="every expert of this policy is excluded"):
        eligibility.mask(request("hi", exclude=frozenset({"plain", "tools", "long"})))
    with pytest.raises(ContextTooLong, match="the largest has 10000 tokens"):
        eligibility.mask(request("x" * 200_000))
    with pytest.raises(ContextTooLong, match="the largest has 50 tokens"):
        eligibility.mask(request("x" * 1_000, needs=frozenset({"tools"})))
