"""Questions written by hand, in words that no template makes, with the facts that answer them."""

from __future__ import annotations

from scripts.demo.facts import FACTS, Fact


def _fact(name: str) -> Fact:
    """The fact that has `name` among its names, actions or questions."""
    return next(f for f in FACTS if name in (*f.names, *f.actions, *f.questions))


_WILD = (
    ("So what is this Sluice thing all about?", "Sluice"),
    ("Can you give me some information about Sluice?", "Sluice"),
    ("What is the point of tensor parallelism?", "tensor parallelism"),
    ("Could you briefly describe what tensor parallelism is?", "tensor parallelism"),
    ("I have never understood pipeline parallelism. What is it?", "pipeline parallelism"),
    ("Give me the definition of pipeline parallelism, please.", "pipeline parallelism"),
    ("What happens in an all-reduce?", "an all-reduce"),
    ("Do you know anything about the KV cache?", "the KV cache"),
    ("What is stored in the KV cache?", "the KV cache"),
    ("Explain briefly how continuous batching works", "continuous batching"),
    ("What is so good about continuous batching?", "continuous batching"),
    ("How is the prefix cache useful?", "the prefix cache"),
    ("Which command do I type to start the server?", "start the server"),
    ("How can the server be started?", "start the server"),
    ("I want to start Sluice, what do I type?", "start the server"),
    ("How would I go about installing Sluice?", "install Sluice"),
    ("On what port is the server running?", "the default port"),
    ("What possible values does parallelType take?", "parallelType"),
    ("Which values are allowed for parallelType?", "parallelType"),
    ("What is pptp short for?", "pptp"),
    ("What happens with parallelType pptp?", "pptp"),
    ("What belongs in the file model-config.yaml?", "model-config.yaml"),
    ("What HTTP endpoints are available?", "the endpoints"),
    ("Which endpoint tells me that the server is ready?", "/readyz"),
    ("How do I find out whether the server is ready?", "/readyz"),
    ("Is it possible to stream responses?", "streaming"),
    ("How does streaming work in Sluice?", "streaming"),
    ("Will my OpenAI client work with Sluice?", "use the OpenAI SDK"),
    ("How do I convert my old checkpoint?", "the converter"),
    ("What is the converter used for?", "the converter"),
    ("What is the use of safetensors?", "safetensors"),
    ("What do you mean by worker group?", "a worker group"),
    ("What does preemption mean in Sluice?", "preemption"),
    ("Hello, who am I speaking to?", "Who are you?"),
    ("So who are you?", "Who are you?"),
    ("And what are you able to tell me?", "What can you do?"),
    ("Hello friend", "Hello"),
    ("Good morning to you", "Hello"),
    ("thank you so very much", "Thanks"),
    ("ok thanks a lot", "Thanks"),
    ("ok bye now", "Bye"),
    ("What makes tensor and pipeline parallelism different?", "TP vs PP?"),
    ("Must I have a GPU for this?", "Do I need a GPU?"),
    ("Does it run without any GPU?", "Do I need a GPU?"),
    ("Which Llama versions can I serve?", "Which models does Sluice support?"),
    ("How do I get tensor parallelism on two GPUs?", "use tensor parallelism"),
    ("What is speculative decoding good for?", "speculative decoding"),
    ("What is quantization about?", "quantization"),
    ("Give me a sample model-config.yaml", "Show me a YAML example."),
    ("Tell me a good joke", "Tell me a joke."),
)
WILD = tuple((question, _fact(name).answer) for question, name in _WILD)
