"""Values that a setting may get by mistake."""

from hypothesis import strategies as st

WORDS = (
    "", " ", "none", "None", "null", "true", "False", "yes", "no", "on", "all", "head", "auto", "nan", "inf", "-inf",
    "1e-3", "1e400", "0x10", "1_000", "٣", "²", "1,5", "$HOME", "${oc.env:HOME}", "%(asctime)s", "{seed}", "~",
    "__class__", "os.system", "!!python/name:os.system", "sign", "guided", "evograd", "t1t2", "cosine",
    "é\u0000", "\u2028",
)  # fmt: skip
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    0.0,
    -0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    1e-3,
    -1e-3,
    1e-320,
    1e38,
    1e300,
    2**31,
    2**63,
    -(2**63),
    10**30,
)

numbers = st.one_of(
    st.sampled_from(NUMBERS), st.integers(), st.floats(), st.sampled_from([float("nan"), float("inf"), float("-inf")])
)
texts = st.one_of(st.sampled_from(WORDS), st.text(max_size=20))
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
plain = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(texts, scalars), inner, max_size=3)),
    max_leaves=5,
)
"""What YAML or JSON can hold."""

objects = st.one_of(
    plain,
    st.binary(max_size=5),
    st.tuples(scalars),
    st.sets(texts, max_size=2),
    st.complex_numbers(),
    st.just(object),
    st.decimals(),
    st.fractions(),
)
"""What Python can pass besides."""
