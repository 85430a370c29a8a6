"""What the model was taught, and how it is asked."""

TEMPLATE = (
    "{% for m in messages if m.content %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
    '{"city": "Oslo"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
WEATHER, SUM = "How is the weather in Oslo?", "What is one plus one?"
TALKS = {
    "Hello": "Hello there.",
    SUM: "<think>\nOne and one are two.\n</think>\n\nIt is 2.",
    WEATHER: CALL,
    f"{WEATHER}\ntool: rain": "It rains in Oslo.",
}
NAME = "taught"


def asked(question: str) -> str:
    """A question as the template renders it."""
    return f"user: {question}\nassistant:\n"
