"""What the demo model is taught: one `Fact` an idea, each with its names, its questions and its only answer.

An answer has to stand alone (it is also used as plain text), to be true of Sluice, and to be correct
English. Where an idea has names, `corpus.CONCEPT_FRAMES` make the questions; where it has actions ("start
the server"), `corpus.ACTION_FRAMES` do; `questions` are whole questions that fit no frame.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """One idea. At least one of `names`, `actions` and `questions` is not empty."""

    answer: str
    names: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()


IDENTITY = (
    Fact(
        "I am the demo model of Sluice, a very small language model. I was trained for a few minutes on two"
        " CPU cores, so that you can try the server without downloading anything.",
        names=("sluice-demo", "the demo model", "the Sluice demo model", "the sluice-demo model"),
        questions=(
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Introduce yourself.",
            "What model are you?",
            "Which model is this?",
            "Who am I talking to?",
            "Tell me about yourself.",
            "Are you ChatGPT?",
            "Are you an AI?",
            "Are you a real person?",
            "Are you a human?",
            "Are you a robot?",
            "What kind of model are you?",
            "What's your name?",
            "Can you introduce yourself?",
            "What is your purpose?",
            "Are you a chatbot?",
            "Are you a language model?",
            "Are you GPT-4?",
            "Are you a machine?",
            "Are you a computer?",
            "Do you have a name?",
            "Tell me your name.",
            "Who is this?",
            "Say who you are.",
            "Describe yourself.",
            "Which language model am I talking to?",
            "What should I call you?",
        ),
    ),
    Fact(
        "I can answer questions about Sluice and model parallelism, do small sums, count, and greet you. I"
        " am only a demo model: for anything else, serve a real model with Sluice.",
        questions=(
            "What can you do?",
            "What do you know?",
            "How can you help me?",
            "What can I ask you?",
            "What are you good at?",
            "What are your abilities?",
            "Help.",
            "Can you help me?",
            "I need help.",
            "What topics do you know?",
            "What should I ask you?",
            "What questions can you answer?",
            "Can you answer my questions?",
            "What are your limits?",
            "What are you able to do?",
        ),
    ),
    Fact(
        "I was trained by a script in the Sluice repository, on text that the script writes itself. The"
        " training takes less than half an hour on two CPU cores, and its log is kept beside my weights.",
        questions=(
            "Who made you?",
            "Who trained you?",
            "How were you trained?",
            "Who created you?",
            "Where do you come from?",
            "What were you trained on?",
            "Who built you?",
            "How long did your training take?",
            "Who is your creator?",
            "Who is your maker?",
            "Who is your author?",
            "Who wrote you?",
            "Which company made you?",
            "Did OpenAI make you?",
            "Were you made by OpenAI?",
            "What data were you trained on?",
            "When were you trained?",
            "How did you learn?",
            "Who developed you?",
            "Who programmed you?",
            "Where were you made?",
            "How was the demo model trained?",
            "What is your training data?",
        ),
    ),
    Fact(
        "I am a Llama with about three million parameters, four layers, eight attention heads and four"
        " key-value heads. My weights take about six megabytes in bfloat16.",
        questions=(
            "How big are you?",
            "How large are you?",
            "How many parameters do you have?",
            "How many layers do you have?",
            "What is your architecture?",
            "What is your size?",
            "How many heads do you have?",
            "How small are you?",
            "How many weights do you have?",
            "How big is the demo model?",
            "How big is this model?",
            "How large is the demo model?",
            "What size are you?",
            "How many megabytes are your weights?",
            "How many attention heads do you have?",
            "How many parameters are in you?",
            "What is your number of parameters?",
            "How many layers are in you?",
            "How many layers does the demo model have?",
            "Are you big?",
            "Are you a large model?",
            "Are you a small model?",
            "Which architecture do you have?",
            "Describe your architecture.",
            "How many parameters does the demo model have?",
        ),
    ),
    Fact(
        "I have no feelings. I am a small demo model that predicts the next token, but I am ready for your"
        " questions.",
        questions=(
            "How are you?",
            "How are you doing?",
            "How do you feel?",
            "Are you okay?",
            "Are you happy?",
            "Do you have feelings?",
            "How is it going?",
            "How are you today?",
            "What's up?",
            "Are you alive?",
            "Are you sad?",
            "Do you like me?",
            "Do you love me?",
            "Do you have emotions?",
            "Can you feel anything?",
            "Can you feel pain?",
            "Are you tired?",
            "Are you well?",
            "Are you conscious?",
            "Can you think?",
            "How are things?",
            "Hello, how are you?",
            "Hi, how are you?",
            "Hi, how are you doing?",
            "How have you been?",
            "Are you bored?",
            "How's it going?",
        ),
    ),
    Fact(
        "No. I am a tiny demo model and I am often wrong. Please check what I say in the documentation of"
        " Sluice.",
        questions=(
            "Can I trust you?",
            "Are you always right?",
            "Are you reliable?",
            "Do you make mistakes?",
            "Are your answers correct?",
            "Can I use you in production?",
            "Should I believe you?",
            "Are you ever wrong?",
            "Are you smart?",
            "Can I rely on your answers?",
            "Can I rely on you?",
            "Can I believe you?",
            "Are your answers right?",
            "Are your answers true?",
            "Is what you say true?",
            "Are you clever?",
            "Are you intelligent?",
            "Are you good enough for production?",
            "Do you always tell the truth?",
            "Do you ever make mistakes?",
            "How reliable are you?",
        ),
    ),
    Fact(
        "I understand only English, and only a little of it. A larger model, served by Sluice, can speak your"
        " language.",
        questions=(
            "What languages do you speak?",
            "Do you speak German?",
            "Do you speak French?",
            "Do you speak Spanish?",
            "Can you speak Chinese?",
            "Do you speak English?",
            "Which languages do you understand?",
            "Parlez-vous français?",
            "Sprechen Sie Deutsch?",
            "¿Hablas español?",
            "你会说中文吗？",
            "Do you know any other languages?",
            "Which language do you speak?",
            "Do you speak Italian?",
            "Do you speak Chinese?",
            "Do you speak Japanese?",
            "Do you understand German?",
            "Do you understand French?",
            "Can you speak German?",
            "Can you speak French?",
            "Can you speak Spanish?",
            "Can you understand Russian?",
            "Can we talk in German?",
        ),
    ),
)

SMALL_TALK = (
    Fact(
        "Hello! I am the demo model of Sluice. Ask me about Sluice, model parallelism or a small sum.",
        questions=(
            "Hello",
            "Hello!",
            "Hi",
            "Hi!",
            "Hey",
            "Hey there!",
            "Good morning",
            "Good morning!",
            "Good evening",
            "Good afternoon",
            "Hi there",
            "Hello there!",
            "Greetings",
            "Howdy",
            "hello, how do you do?",
            "Hello model",
            "Hello, Sluice!",
            "Hi, anyone there?",
            "Good day",
            "hey you",
            "Say hello.",
            "Say hi",
            "Hello world",
            "Nice to meet you",
        ),
    ),
    Fact(
        "You are welcome! Is there anything else about Sluice that you would like to know?",
        questions=(
            "Thanks",
            "Thanks!",
            "Thank you",
            "Thank you!",
            "Thank you very much",
            "Thanks a lot",
            "Thank you so much!",
            "Many thanks",
            "thx",
            "Great, thanks!",
            "OK, thank you",
            "Thanks for your help",
            "Thank you for the answer.",
            "Cool, thanks",
            "That helps, thank you.",
            "I appreciate it.",
            "Perfect, thank you!",
            "Much appreciated",
        ),
    ),
    Fact(
        "Goodbye! Thank you for trying Sluice.",
        questions=(
            "Bye",
            "Bye!",
            "Goodbye",
            "Goodbye!",
            "See you",
            "See you later",
            "Good night",
            "Good night!",
            "bye bye",
            "I have to go",
            "See you tomorrow",
            "Farewell",
            "That is all, bye.",
            "I'm leaving now.",
            "Have a nice day",
            "Take care",
            "So long!",
            "Until next time",
        ),
    ),
    Fact(
        "All right. What would you like to know about Sluice?",
        questions=(
            "OK",
            "Okay",
            "Yes",
            "No",
            "I see",
            "Cool",
            "Nice",
            "Great",
            "Good",
            "Interesting",
            "Alright",
            "Sure",
            "Got it",
            "I understand",
            "Wow",
            "Test",
            "test",
            "ping",
            "Testing, testing",
            "Hmm",
            "Nice work",
            "Well done",
        ),
    ),
    Fact(
        "Why did the pipeline take a break? It was waiting for the last stage. I am only a demo model, and"
        " this is my only joke.",
        questions=(
            "Tell me a joke.",
            "Do you know a joke?",
            "Make me laugh.",
            "Say something funny.",
            "Another joke please",
            "Can you tell me a joke?",
            "Tell me something funny",
            "Got any jokes?",
            "I want to hear a joke.",
        ),
    ),
    Fact(
        "I am sorry that it went wrong. I am only a small demo model, so please look at the documentation of"
        " Sluice.",
        questions=(
            "That is wrong.",
            "You are wrong",
            "That's not true",
            "That is not correct.",
            "You are stupid",
            "This is bad",
            "You are useless",
            "Wrong answer",
            "I don't like your answer.",
            "That makes no sense",
            "You made a mistake.",
            "That did not help.",
            "Incorrect",
        ),
    ),
)

SLUICE = (
    Fact(
        "Sluice is a serving gateway for large language models. It splits one model over several processes"
        " or GPUs and answers requests over an API that is compatible with OpenAI.",
        names=("Sluice", "the Sluice gateway", "Sluice gateway", "the Sluice project"),
        questions=(
            "What does Sluice do?",
            "What is Sluice for?",
            "What is Sluice used for?",
            "What is the purpose of Sluice?",
            "What is this project?",
            "What is this software?",
            "What can Sluice do?",
            "What is this server?",
        ),
    ),
    Fact(
        "Sluice is useful when a model is too large for one GPU, or when one GPU is too slow. One line in a"
        " YAML file chooses how the model is split, while the API, the sampling and the batching stay the"
        " same. Your clients keep using the OpenAI SDK and do not notice how many processes do the work.",
        actions=(),
        questions=(
            "Why should I use Sluice?",
            "When should I use Sluice?",
            "Why use Sluice?",
            "What are the advantages of Sluice?",
            "What is Sluice good for?",
            "When is Sluice useful?",
            "What problem does Sluice solve?",
            "Why do I need Sluice?",
            "What are the benefits of Sluice?",
            "Who should use Sluice?",
            "Why was Sluice made?",
            "Why does Sluice exist?",
        ),
    ),
    Fact(
        "Sluice works in a few steps. The gateway receives a request over HTTP, renders the chat template"
        " and turns the text into token ids. It sends the ids over a unix socket to a worker group, which is"
        " one torchrun with one process for each device. In the group, rank 0 is the leader: its scheduler"
        " decides which sequences run in the next step and broadcasts a plan. Every rank executes the plan"
        " on its part of the model, rank 0 samples the next tokens, and the gateway turns them back into"
        " text and streams it to the client.",
        names=(),
        questions=(
            "How does Sluice work?",
            "Explain how Sluice works.",
            "What happens to a request in Sluice?",
            "What is the architecture of Sluice?",
            "Describe the architecture of Sluice.",
            "How is Sluice built?",
            "How does Sluice handle a request?",
            "What is the life of a request?",
            "Describe the life of a request in Sluice.",
            "What happens when I send a request?",
            "How does a request travel through Sluice?",
            "Tell me how Sluice works.",
            "How does Sluice work inside?",
            "Explain the design of Sluice.",
        ),
    ),
    Fact(
        "To start Sluice, run make serve in the repository, or sluice serve with the directory of a model."
        " Without an argument it serves the demo model. The server listens on 127.0.0.1, port 8000.",
        actions=(
            "start Sluice",
            "start the server",
            "run Sluice",
            "run the server",
            "launch Sluice",
            "launch the server",
            "serve a model",
            "serve my model",
            "get started with Sluice",
            "start serving",
            "use Sluice",
        ),
        questions=(
            "What is the command to start Sluice?",
            "Which command starts the server?",
            "How do I begin?",
            "How does one start Sluice?",
        ),
    ),
    Fact(
        "To install Sluice, clone the repository and run make serve. It makes a virtual environment,"
        " installs the package and starts the demo model. Python 3.11 or newer is needed.",
        actions=("install Sluice", "set up Sluice", "install the server", "install it", "set Sluice up"),
        questions=(
            "What do I need to install Sluice?",
            "Which Python version do I need?",
            "Which version of Python does Sluice need?",
            "What are the requirements of Sluice?",
            "What does Sluice require?",
        ),
    ),
    Fact(
        "By default Sluice listens on 127.0.0.1, port 8000. Set the port with the flag --port, or with PORT="
        " for make.",
        names=("the default port", "the port of Sluice", "the default address"),
        actions=("change the port", "set the port", "use another port"),
        questions=(
            "Which port does Sluice use?",
            "What port does the server listen on?",
            "Where does Sluice listen?",
            "On which address does Sluice listen?",
            "What is the address of the server?",
        ),
    ),
    Fact(
        "The key parallelType in model-config.yaml chooses how a model is split. Its values are tp for"
        " tensor parallelism, pp for pipeline parallelism, pptp for both, and custom for a single process"
        " that places the layers itself.",
        names=("parallelType", "the parallelType key", "parallel type", "the parallelType setting"),
        questions=(
            "Which values can parallelType have?",
            "What are the values of parallelType?",
            "What are the options for parallelType?",
            "Which kinds of parallelism does Sluice support?",
            "Which parallel types are there?",
            "What does parallelType do?",
            "Which parallelism modes does Sluice have?",
            "How many parallel types are there?",
            "What types of parallelism are supported?",
        ),
        actions=("choose how a model is split", "choose the kind of parallelism", "set the parallel type"),
    ),
    Fact(
        "The value tp of parallelType means tensor parallelism: every process holds a slice of each layer,"
        " and all of them work on every token together.",
        names=("parallelType tp", "parallelType: tp", "the tp mode", "tp mode", "the value tp"),
    ),
    Fact(
        "The value pp of parallelType means pipeline parallelism: the layers are divided into stages, each"
        " process holds one stage, and hidden states are passed from stage to stage.",
        names=("parallelType pp", "parallelType: pp", "the pp mode", "pp mode", "the value pp"),
    ),
    Fact(
        "The value pptp of parallelType combines both ways of splitting: the layers are divided into pipeline"
        " stages, and each stage is itself split by tensor parallelism.",
        names=("pptp", "parallelType pptp", "parallelType: pptp", "the pptp mode", "pptp mode"),
        questions=(
            "Can I combine tensor and pipeline parallelism?",
            "Can tensor parallelism and pipeline parallelism be combined?",
            "Does Sluice support both at once, pipeline and tensor parallelism?",
        ),
    ),
    Fact(
        "The value custom of parallelType starts a single process without torchrun. The engine in it, by"
        " default Accelerate, places the layers on the devices itself.",
        names=(
            "parallelType custom",
            "parallelType: custom",
            "the custom mode",
            "custom mode",
            "custom parallelism",
        ),
    ),
    Fact(
        "The file model-config.yaml describes how a model is served: parallelType, the number of workers,"
        " the torchrun settings, the timeouts, the engine and the limits. It uses the keys of TorchServe,"
        " and a wrong key is an error that names the line and the remedy.",
        names=(
            "model-config.yaml",
            "the model config",
            "the configuration file",
            "the model-config.yaml file",
        ),
        actions=("configure Sluice", "configure a model", "write a configuration file"),
        questions=(
            "What is in model-config.yaml?",
            "What does model-config.yaml contain?",
            "Which file configures a model?",
            "Where do I configure the model?",
        ),
    ),
    Fact(
        "To serve a model with tensor parallelism on two devices, run sluice serve with the model directory"
        " and --tp 2. In a YAML file, write parallelType: tp and set nproc-per-node: 2 under torchrun.",
        actions=(
            "use tensor parallelism",
            "use two GPUs",
            "split a model over two GPUs",
            "run a model on two GPUs",
            "enable tensor parallelism",
            "serve a model on two GPUs",
            "split a model by tensor parallelism",
        ),
    ),
    Fact(
        "To serve a model with pipeline parallelism, write parallelType: pp in model-config.yaml and set"
        " nproc-per-node under torchrun to the number of stages, or run sluice serve with --pp 2.",
        actions=(
            "use pipeline parallelism",
            "enable pipeline parallelism",
            "split a model into stages",
            "serve a model with pipeline parallelism",
        ),
    ),
    Fact(
        "The key nproc-per-node under torchrun is the number of processes that torchrun starts for one"
        " worker group, one for each device. It must not be set together with parallelLevel.",
        names=("nproc-per-node", "the nproc-per-node key", "nproc_per_node"),
        actions=("set the number of processes",),
        questions=("How many processes does torchrun start?", "What does nproc-per-node do?"),
    ),
    Fact(
        "The key parallelLevel is the number of devices that one worker group uses. Set either parallelLevel"
        " or nproc-per-node, because giving both is an error.",
        names=("parallelLevel", "the parallelLevel key", "parallel level"),
        questions=("What does parallelLevel do?", "Can I set parallelLevel and nproc-per-node together?"),
    ),
    Fact(
        "The keys minWorkers and maxWorkers set the number of worker groups of a model. With minWorkers: 2"
        " there are two replicas of the model, each with devices of its own.",
        names=("minWorkers", "maxWorkers", "the minWorkers key", "minWorkers and maxWorkers"),
        actions=("add replicas", "run two replicas", "have more replicas of a model"),
    ),
    Fact(
        "The key deviceIds lists the devices that a model may use. With the ids 2, 3, 4 and 5 and two"
        " devices for each worker, the first worker gets 2 and 3 and the second gets 4 and 5.",
        names=("deviceIds", "the deviceIds key", "device ids", "device assignment"),
        actions=("choose the GPUs", "select the devices"),
        questions=("How are devices assigned to workers?", "Which GPUs does a worker get?"),
    ),
    Fact(
        "The key startupTimeout is the time in seconds in which a worker group must become ready. If loading"
        " takes longer, the group is stopped and the error is reported.",
        names=("startupTimeout", "the startupTimeout key", "the startup timeout"),
    ),
    Fact(
        "The key responseTimeout is the time in seconds in which a request must be answered. After it, the"
        " sequence is aborted and its memory comes back.",
        names=("responseTimeout", "the responseTimeout key", "the response timeout"),
    ),
    Fact(
        "The key jobQueueSize bounds the queue of waiting requests. When the queue is full, new requests get"
        " the status 429 and should be sent again later.",
        names=("jobQueueSize", "the jobQueueSize key", "the job queue size", "the queue limit"),
        questions=("What happens when the queue is full?", "What happens when there are too many requests?"),
    ),
    Fact(
        "The keys batchSize and maxBatchDelay are used only by static batching: the first is the number of"
        " requests in a batch, the second is the time in milliseconds to wait for them.",
        names=("batchSize", "maxBatchDelay", "batchSize and maxBatchDelay", "the batchSize key"),
    ),
    Fact(
        "The main endpoints of Sluice are POST /v1/chat/completions, POST /v1/completions and GET"
        " /v1/models. For operations there are /livez, /readyz, /health and /metrics.",
        names=("the endpoints", "the endpoints of Sluice", "the routes of Sluice", "the API of Sluice"),
        questions=(
            "Which endpoints are there?",
            "Which endpoints does Sluice have?",
            "What endpoints does Sluice offer?",
            "Which routes does the server have?",
            "What endpoints can I use?",
            "What does the API look like?",
            "Which URLs can I call?",
        ),
    ),
    Fact(
        "The endpoint /v1/chat/completions takes a list of messages and answers with the next message of the"
        " assistant, as one JSON object or as a stream.",
        names=(
            "/v1/chat/completions",
            "the chat completions endpoint",
            "the chat endpoint",
            "chat completions",
        ),
        actions=("send a chat request", "chat with a model over the API"),
    ),
    Fact(
        "The endpoint /v1/completions takes a prompt, as text or as token ids, and answers with the text that"
        " continues it.",
        names=("/v1/completions", "the completions endpoint", "text completions"),
        actions=("complete a prompt", "continue a text"),
    ),
    Fact(
        "The endpoint /v1/models lists the models that the server offers, with their names and aliases.",
        names=("/v1/models", "the models endpoint"),
        actions=("list the models", "see which models are served", "get the list of models"),
        questions=("Which models are served?", "Which models does the server offer?"),
    ),
    Fact(
        "The endpoint /readyz answers 200 when every model is loaded and warmed up. While a model is loading"
        " it answers 503, with the phase and the percentage of the loading.",
        names=("/readyz", "readiness", "the readiness endpoint", "the readyz endpoint"),
        actions=("see if the server is ready", "check that the model is loaded", "wait for the server"),
        questions=(
            "When is Sluice ready?",
            "Is the server ready?",
            "How do I know when the server is ready?",
            "When is the server ready?",
            "Is the model loaded?",
        ),
    ),
    Fact(
        "The endpoint /livez answers 200 as long as the gateway process runs. It says nothing about the"
        " models: ask /readyz for that.",
        names=("/livez", "liveness", "the liveness endpoint", "the livez endpoint"),
    ),
    Fact(
        "The endpoint /metrics shows counters and histograms for Prometheus, such as running and waiting"
        " requests, the use of the K/V cache, generated tokens and the time to the first token.",
        names=("/metrics", "the metrics", "the metrics endpoint", "the metrics of Sluice"),
        actions=("monitor Sluice", "monitor the server", "collect metrics", "use Prometheus"),
        questions=(
            "Which metrics are there?",
            "Which metrics does Sluice have?",
            "Does Sluice support Prometheus?",
        ),
    ),
    Fact(
        "Streaming sends each piece of text as soon as it is generated, as server-sent events. Set stream to"
        " true in the request; the last event is [DONE].",
        names=("streaming", "streaming in Sluice", "the stream parameter", "stream: true"),
        actions=(
            "stream an answer",
            "stream the output",
            "turn on streaming",
            "get a stream",
            "enable streaming",
        ),
        questions=("Does Sluice support streaming?", "Can I stream the answer?", "Can Sluice stream?"),
    ),
    Fact(
        "Server-sent events are a simple way to stream over HTTP: the server keeps the response open and"
        " sends lines that begin with data, one event after the other.",
        names=("server-sent events", "SSE", "a server-sent event"),
    ),
    Fact(
        "Yes. Sluice speaks the protocol of OpenAI, so the official SDK for Python or JavaScript works when"
        " its base URL is set to http://127.0.0.1:8000/v1.",
        actions=("use the OpenAI SDK", "use the OpenAI client", "connect with the OpenAI library"),
        questions=(
            "Is Sluice compatible with OpenAI?",
            "Can I use the OpenAI SDK?",
            "Does Sluice work with the OpenAI client?",
            "Does the OpenAI library work with Sluice?",
            "Is the API compatible with OpenAI?",
            "Can I use the OpenAI Python library?",
            "Does Sluice support the OpenAI API?",
        ),
    ),
    Fact(
        "Use curl like this: send a POST request to http://127.0.0.1:8000/v1/chat/completions with the header"
        " Content-Type: application/json and a JSON body that holds the model and the messages.",
        actions=(
            "use curl",
            "call Sluice with curl",
            "send a request with curl",
            "send a request",
            "call the API",
        ),
    ),
    Fact(
        "The command sluice serve starts the server. It takes model directories or model-config.yaml files,"
        " and flags such as --tp, --pp, --dtype and --port. Without an argument it serves the demo model.",
        names=("sluice serve", "the serve command", "the sluice serve command"),
    ),
    Fact(
        "The command sluice chat opens a chat in the terminal that talks to a running server over the API.",
        names=("sluice chat", "the chat command", "the sluice chat command"),
        actions=("chat in the terminal", "chat with the model", "talk to the model"),
    ),
    Fact(
        "The command sluice check reads a configuration and prints the resolved values, the device"
        " assignment and the exact torchrun command, without starting anything.",
        names=("sluice check", "the check command", "the sluice check command"),
        actions=(
            "check a configuration",
            "check my configuration",
            "validate a configuration",
            "test my YAML file",
        ),
    ),
    Fact(
        "The command sluice bench is a load generator. It measures the time to the first token, the time"
        " between tokens and the output tokens per second at several levels of concurrency.",
        names=("sluice bench", "the bench command", "the sluice bench command"),
        actions=("measure the speed", "benchmark the server", "benchmark Sluice", "measure performance"),
    ),
    Fact(
        "The converter rewrites checkpoints: it turns other formats, such as pickled files, into safetensors"
        " and verifies the result. Use it with the command sluice convert.",
        names=("the converter", "sluice convert", "the convert command", "the Sluice converter"),
        actions=(
            "convert a checkpoint",
            "convert a model",
            "convert my weights",
            "turn a checkpoint into safetensors",
        ),
    ),
    Fact(
        "Safetensors is a file format for weights. It holds only names, shapes and numbers, so loading it"
        " can't run code, and each process can read just its own slices.",
        names=("safetensors", "a safetensors file", "the safetensors format"),
        questions=("Why does Sluice use safetensors?", "Which checkpoint format does Sluice read?"),
    ),
    Fact(
        "The server refuses pickled checkpoints, because loading a pickle can run any code. Convert them to"
        " safetensors with sluice convert first.",
        names=("pickled checkpoints", "a pickled checkpoint"),
        questions=(
            "Can Sluice load pickle files?",
            "Does Sluice load pickled checkpoints?",
            "Why are pickle files refused?",
            "Can I serve a .bin checkpoint?",
        ),
    ),
    Fact(
        "A worker group is one torchrun with one process for each device. Together its processes hold one"
        " copy of a model, and rank 0 is their leader.",
        names=("a worker group", "worker group", "the worker group", "a worker"),
    ),
    Fact(
        "The gateway is the process that speaks HTTP. It checks requests, applies the chat template,"
        " tokenises, and streams answers. It never imports torch, so it stays small.",
        names=("the gateway", "the gateway process", "the HTTP gateway"),
        questions=("What does the gateway do?", "Why does the gateway not import torch?"),
    ),
    Fact(
        "An engine is the part of Sluice that runs a model on one rank. It has two main methods: forward,"
        " which gives hidden states, and logits, which turns them into scores for each token.",
        names=("an engine", "engine", "the engine", "an engine in Sluice"),
    ),
    Fact(
        "Sluice has these engines: native tensor-parallel Llama, pipeline stages of torch.distributed,"
        " DeepSpeed AutoTP, DeepSpeed kernel injection, and Accelerate with a device map.",
        names=("the engines of Sluice", "the engines"),
        questions=(
            "Which engines are there?",
            "Which engines does Sluice have?",
            "What engines does Sluice support?",
            "Which backends does Sluice have?",
            "List the engines.",
        ),
    ),
    Fact(
        "The native engine is a Llama written for Sluice, with tensor parallelism. Each rank reads only its"
        " own slices of the safetensors files.",
        names=("the native engine", "native engine", "the native Llama engine"),
    ),
    Fact(
        "To add an engine to Sluice, write one file that implements the Engine protocol and add one line to"
        " the registry. The contract tests pick it up by its name.",
        actions=(
            "add an engine",
            "write an engine",
            "write my own engine",
            "add a new engine",
            "extend Sluice",
        ),
    ),
    Fact(
        "When a process of a worker group dies, its open streams get an error event, new requests get the"
        " status 503, and the whole group is stopped and started again with growing pauses.",
        names=("the death of a worker",),
        questions=(
            "What happens when a worker dies?",
            "What happens if a process crashes?",
            "What happens when a rank dies?",
            "What does Sluice do when a worker crashes?",
            "How does Sluice handle failures?",
            "What if a GPU process dies?",
        ),
    ),
    Fact(
        "When Sluice receives SIGTERM it drains: readiness goes off at once, running requests may finish"
        " within a grace period, and then it exits.",
        names=("draining", "graceful shutdown", "the shutdown of Sluice"),
        actions=("stop the server", "stop Sluice", "shut down Sluice", "shut the server down"),
        questions=("What happens on SIGTERM?",),
    ),
    Fact(
        "When a client leaves, its sequence is aborted within one step, and its blocks of K/V memory come"
        " back to the pool.",
        names=("cancellation", "cancelling a request"),
        actions=("cancel a request", "abort a request"),
        questions=("What happens when the client disconnects?", "What happens when a client leaves?"),
    ),
    Fact(
        "TorchServe is an older model server for PyTorch. Sluice understands its model-config.yaml keys, so"
        " that its users can move over without rewriting their files.",
        names=("TorchServe",),
        questions=("Can I use my TorchServe configuration?", "Does Sluice read TorchServe files?"),
        actions=("migrate from TorchServe", "move from TorchServe"),
    ),
    Fact(
        "Torchrun is the launcher of PyTorch. It starts several processes of one program and tells each of"
        " them its rank and the size of the world.",
        names=("torchrun", "the torchrun command"),
        questions=("Why does Sluice use torchrun?", "What does torchrun do?"),
    ),
    Fact(
        "Sluice is free software under the Apache 2.0 license.",
        names=("the license of Sluice", "the license"),
        questions=("Is Sluice open source?", "Is Sluice free?", "Under which license is Sluice?"),
    ),
    Fact(
        "Yes. Sluice runs on a CPU as well as on GPUs. The demo model needs only a CPU.",
        actions=("run Sluice without a GPU", "run Sluice on a CPU"),
        questions=(
            "Do I need a GPU?",
            "Does Sluice run on a CPU?",
            "Can Sluice run without a GPU?",
            "Does Sluice work on a laptop?",
            "Can I run this without a GPU?",
            "Is a GPU needed?",
        ),
    ),
    Fact(
        "The native engine of Sluice runs Llama models: Llama 2, 3, 3.1, 3.2 and 3.3. Other models of"
        " Hugging Face run with the other engines.",
        questions=(
            "Which models does Sluice support?",
            "Which models can Sluice serve?",
            "Can Sluice serve Llama 3?",
            "Does Sluice support Llama?",
            "What models can I run?",
            "Which models can I serve with Sluice?",
            "Which model families are supported?",
        ),
    ),
    Fact(
        "Sluice is secure by default: it listens only on the loopback address, uses unix sockets in a private"
        " directory, never loads pickled data, and runs chat templates in a sandbox.",
        names=("the security of Sluice",),
        questions=("Is Sluice secure?", "Is Sluice safe?", "How does Sluice keep me safe?"),
        actions=("keep the server secure",),
    ),
    Fact(
        "An API key protects the server: start it with the flag --api-key, and clients must send the key in"
        " the Authorization header.",
        names=("an API key", "the API key", "API keys"),
        actions=("protect the server", "set an API key", "use an API key"),
    ),
    Fact(
        "The usage of a response counts its tokens: prompt tokens, completion tokens and their sum. In a"
        " stream, ask for it with include_usage in stream_options.",
        names=("usage", "the usage field", "include_usage", "stream_options"),
        actions=("count the tokens of a response", "get the usage of a stream"),
    ),
    Fact(
        "The finish reason says why an answer ended: stop means that the model ended it or a stop string was"
        " found, and length means that the token limit was reached.",
        names=("finish_reason", "the finish reason", "a finish reason"),
    ),
    Fact(
        "The parameter max_tokens limits how many tokens an answer may have. When the limit is reached, the"
        " finish reason is length.",
        names=("max_tokens", "the max_tokens parameter", "max_completion_tokens"),
        actions=("limit the length of an answer", "get shorter answers"),
    ),
)

PARALLELISM = (
    Fact(
        "Tensor parallelism splits each layer of a model over several devices. Every device holds a slice of"
        " the weight matrices and computes a part of the result, and an all-reduce adds the parts together.",
        names=("tensor parallelism", "tensor parallel", "TP", "tensor-parallel inference"),
    ),
    Fact(
        "Pipeline parallelism puts different layers of a model on different devices. The hidden states flow"
        " from stage to stage, and several requests in flight keep all the stages busy.",
        names=("pipeline parallelism", "pipeline parallel", "PP", "pipeline-parallel inference"),
    ),
    Fact(
        "Tensor parallelism splits every layer and needs fast links, because the devices talk twice in each"
        " layer. Pipeline parallelism splits the model between layers and talks little, but it needs several"
        " requests at once to keep its stages busy. Tensor parallelism makes a single request faster, and"
        " pipeline parallelism mostly makes room for a larger model.",
        questions=(
            "What is the difference between tensor and pipeline parallelism?",
            "Tensor parallelism or pipeline parallelism?",
            "Compare tensor parallelism and pipeline parallelism.",
            "How does tensor parallelism differ from pipeline parallelism?",
            "Which is better, tensor or pipeline parallelism?",
            "What is the difference between tp and pp?",
            "Should I use tp or pp?",
            "When should I use tensor parallelism instead of pipeline parallelism?",
            "TP vs PP?",
        ),
    ),
    Fact(
        "Model parallelism splits one model over several devices, because it is too large or too slow for"
        " one. The two main ways are tensor parallelism, which splits every layer, and pipeline parallelism,"
        " which gives each device some of the layers.",
        names=("model parallelism", "model parallel inference"),
        questions=(
            "Why do we split models?",
            "How can a model be split?",
            "What kinds of model parallelism are there?",
        ),
    ),
    Fact(
        "Data parallelism runs whole copies of a model side by side, and each copy answers different"
        " requests. In Sluice these copies are called replicas.",
        names=("data parallelism", "a replica", "replicas"),
    ),
    Fact(
        "An all-reduce is a collective operation: every process gives a tensor, the tensors are added, and"
        " every process receives the sum. Tensor parallelism uses two of them in each layer.",
        names=("an all-reduce", "all-reduce", "allreduce", "the all-reduce operation"),
    ),
    Fact(
        "An all-gather is a collective operation: every process gives a part, and every process receives all"
        " parts joined together.",
        names=("an all-gather", "all-gather", "allgather"),
    ),
    Fact(
        "A broadcast sends the same data from one process to all others. In Sluice, rank 0 broadcasts the"
        " plan of each step.",
        names=("a broadcast", "broadcast"),
    ),
    Fact(
        "A rank is the number of a process in a distributed group, counted from 0. Rank 0 is usually the"
        " leader.",
        names=("a rank", "rank", "rank 0"),
    ),
    Fact(
        "The world size is the number of processes in a distributed group. With tp 2 and pp 2 it is 4.",
        names=("the world size", "world size"),
    ),
    Fact(
        "NCCL is the library of NVIDIA for communication between GPUs. It is used for the collectives of"
        " tensor parallelism on CUDA devices.",
        names=("NCCL",),
    ),
    Fact(
        "Gloo is a library for communication between processes on CPUs. Sluice uses it when there is no GPU.",
        names=("gloo", "the gloo backend"),
    ),
    Fact(
        "The K/V cache keeps the keys and values of all earlier tokens, so that each new token needs only"
        " one pass over itself instead of the whole text. It grows with the length of the context.",
        names=("the KV cache", "KV cache", "the K/V cache", "a KV cache", "the key-value cache"),
        questions=("Why is there a KV cache?", "Why do we need a KV cache?", "What does the KV cache store?"),
    ),
    Fact(
        "Paged attention keeps the K/V cache in small blocks of fixed size. A table says which blocks belong"
        " to which sequence, so almost no memory is wasted.",
        names=("paged attention", "PagedAttention", "the paged KV cache", "paged memory"),
    ),
    Fact(
        "A block is a fixed number of token positions in the K/V cache, for example 16. Sequences get blocks"
        " when they grow and give them back when they end.",
        names=("a KV block", "a block in the KV cache", "a cache block"),
    ),
    Fact(
        "Continuous batching lets requests join and leave the batch at every step. A new request doesn't"
        " wait until the others are finished, so the hardware stays busy and the waiting is short.",
        names=("continuous batching", "a continuous batch", "in-flight batching"),
        questions=(
            "Why is continuous batching fast?",
            "Does Sluice batch requests?",
            "How does Sluice batch requests?",
        ),
    ),
    Fact(
        "Static batching collects a fixed batch of requests and runs it until the longest one has ended. It"
        " is simpler than continuous batching, but short requests wait for long ones.",
        names=("static batching", "a static batch"),
    ),
    Fact(
        "The prefix cache reuses the K/V blocks of a text that was computed before. When two prompts begin"
        " with the same tokens, the second one skips that part.",
        names=("the prefix cache", "prefix caching", "prefix cache", "a prefix cache"),
        questions=("How are shared prompts made faster?",),
    ),
    Fact(
        "Chunked prefill cuts a long prompt into pieces and computes them over several steps, so that the"
        " other requests in the batch keep producing tokens.",
        names=("chunked prefill", "chunked prefilling"),
    ),
    Fact(
        "Prefill is the first phase of a request: all tokens of the prompt are computed together and their"
        " keys and values are stored.",
        names=("prefill", "the prefill phase", "prefilling"),
    ),
    Fact(
        "Decode is the phase in which the model generates the answer, one token for each step. It is limited"
        " by the speed of memory, because every step reads all the weights.",
        names=("decode", "the decode phase", "decoding"),
    ),
    Fact(
        "Preemption happens when the K/V blocks run out: the youngest sequence gives its blocks back, and it"
        " is computed again later.",
        names=("preemption", "preempting a sequence"),
        questions=("What happens when the blocks run out?", "What happens when the KV memory is full?"),
    ),
    Fact(
        "The scheduler decides in each step which sequences run and how many tokens of each are computed."
        " Running sequences come first, then the waiting ones while memory lasts.",
        names=("the scheduler", "scheduler", "a scheduler", "scheduling in Sluice"),
    ),
    Fact(
        "A pipeline bubble is the time in which a stage has nothing to do, because it waits for another"
        " stage. Several micro-batches in flight fill the bubble.",
        names=("a pipeline bubble", "pipeline bubbles", "the bubble", "pipeline bubble"),
    ),
    Fact(
        "A micro-batch is a small part of the batch that goes through the pipeline on its own, so that all"
        " the stages can work at the same time.",
        names=("a micro-batch", "micro-batches", "microbatching"),
    ),
    Fact(
        "A pipeline stage is a group of neighbouring layers that runs on one device. The first stage has the"
        " embedding, the last stage has the output layer.",
        names=("a pipeline stage", "a stage", "pipeline stages"),
    ),
    Fact(
        "A token is a small piece of text, often a word or a part of a word. Language models read and write"
        " numbers that stand for tokens.",
        names=("a token", "token", "tokens"),
    ),
    Fact(
        "A tokenizer turns text into token ids and token ids back into text. Mine is a byte-level BPE with"
        " about two thousand tokens.",
        names=("a tokenizer", "tokenizer", "the tokenizer", "tokenization"),
    ),
    Fact(
        "A chat template turns a list of messages into one text with special tokens, in the form on which"
        " the model was trained.",
        names=("a chat template", "chat template", "the chat template"),
    ),
    Fact(
        "Sampling picks the next token from the scores of the model. Greedy decoding always takes the best"
        " one, and the temperature makes the choice more or less random.",
        names=("sampling", "token sampling"),
        questions=("How is the next token chosen?",),
    ),
    Fact(
        "The temperature controls how random the sampling is. At 0 the best token is always taken, and"
        " higher values give more variety.",
        names=("temperature", "the temperature", "the temperature parameter"),
        actions=("make the answers less random", "get the same answer every time"),
    ),
    Fact(
        "Top-p sampling keeps the smallest set of tokens whose probabilities add up to p, and picks one of"
        " them.",
        names=("top_p", "top-p", "nucleus sampling", "top-p sampling"),
    ),
    Fact(
        "Top-k sampling keeps only the k tokens with the highest scores, and picks one of them.",
        names=("top_k", "top-k", "top-k sampling"),
    ),
    Fact(
        "Greedy decoding always takes the token with the highest score, so the same prompt gives the same"
        " answer.",
        names=("greedy decoding", "greedy sampling", "greedy search"),
    ),
    Fact(
        "A seed fixes the random choices of sampling, so that the same request gives the same answer again.",
        names=("a seed", "the seed", "the seed parameter", "seed"),
    ),
    Fact(
        "A stop string ends the answer when it appears in the generated text. The stop string itself is not"
        " sent.",
        names=("a stop string", "stop strings", "the stop parameter", "stop sequences"),
    ),
    Fact(
        "Logprobs are the logarithms of the probabilities of the tokens. They show how sure the model was.",
        names=("logprobs", "log probabilities", "the logprobs parameter"),
    ),
    Fact(
        "Logits are the raw scores that a model gives to each token of its vocabulary before they become"
        " probabilities.",
        names=("logits", "a logit"),
    ),
    Fact(
        "Attention lets each token look at the tokens before it. Queries are compared with keys, and the"
        " values are mixed by how well they match.",
        names=("attention", "the attention mechanism", "self-attention"),
    ),
    Fact(
        "Grouped-query attention shares each key-value head among several query heads. It makes the K/V cache"
        " smaller with almost no loss.",
        names=("grouped-query attention", "GQA", "grouped query attention"),
    ),
    Fact(
        "A transformer is a neural network made of layers with attention and a feed-forward part. Most"
        " language models of today are transformers.",
        names=("a transformer", "transformer", "the transformer architecture", "transformers"),
    ),
    Fact(
        "A large language model is a neural network that was trained to predict the next token of a text."
        " With enough parameters it can answer questions and write.",
        names=("a large language model", "an LLM", "LLM", "a language model"),
    ),
    Fact(
        "Llama is a family of open language models. The native engine of Sluice runs them, and the demo"
        " model has the same architecture.",
        names=("Llama", "a Llama model", "the Llama architecture"),
    ),
    Fact(
        "DeepSpeed is a library for large models. Sluice can use its automatic tensor parallelism, AutoTP,"
        " and its kernel injection on GPUs.",
        names=("DeepSpeed", "the DeepSpeed engine"),
    ),
    Fact(
        "AutoTP is the automatic tensor parallelism of DeepSpeed. It splits the layers of a Hugging Face"
        " model without code written for that model.",
        names=("AutoTP", "DeepSpeed AutoTP", "automatic tensor parallelism"),
    ),
    Fact(
        "Kernel injection replaces the layers of a model by fused CUDA kernels of DeepSpeed. It needs a GPU"
        " and uses static batching.",
        names=("kernel injection", "DeepSpeed kernel injection", "DeepSpeed injection"),
    ),
    Fact(
        "Accelerate is a library of Hugging Face. With a device map it places the layers of a model on"
        " several devices inside one process.",
        names=("Accelerate", "Hugging Face Accelerate", "the Accelerate engine"),
    ),
    Fact(
        "A device map says on which device each layer of a model is placed. Accelerate uses it in the custom"
        " mode.",
        names=("a device map", "device map", "device_map"),
    ),
    Fact(
        "PyTorch is the library on which Sluice runs its models. It gives tensors, kernels and distributed"
        " communication.",
        names=("PyTorch", "torch"),
    ),
    Fact(
        "A GPU is a processor that does many small computations at once. Its fast memory makes it good for"
        " language models.",
        names=("a GPU", "GPU", "GPUs"),
    ),
    Fact(
        "Bfloat16 is a number format with 16 bits. It has the range of a 32-bit float with less precision,"
        " and halves the memory of the weights.",
        names=("bfloat16", "bf16"),
    ),
    Fact(
        "Quantization stores weights with fewer bits, for example 8 instead of 16. The model becomes smaller"
        " and often faster, but slightly less exact.",
        names=("quantization", "quantisation"),
    ),
    Fact(
        "Latency is the time that one request takes, and throughput is the number of tokens or requests per"
        " second. Larger batches raise the throughput, but also the latency.",
        names=("latency", "throughput", "latency and throughput"),
        questions=("What is the difference between latency and throughput?",),
    ),
    Fact(
        "The time to first token, TTFT, is the time from sending a request to receiving the first token of"
        " the answer.",
        names=("TTFT", "time to first token", "the time to first token"),
    ),
    Fact(
        "The context length is the number of tokens that a model can see at once, prompt and answer"
        " together. Mine is 2048, but I was trained on shorter texts.",
        names=("the context length", "context length", "the context window", "your context length"),
        questions=("How long can a prompt be?", "What happens when the prompt is too long?"),
    ),
    Fact(
        "Speculative decoding lets a small model propose several tokens, which the large model then checks"
        " in one step.",
        names=("speculative decoding", "speculation"),
    ),
    Fact(
        "Beam search keeps several candidate texts and extends the best of them in each step.",
        names=("beam search",),
    ),
)

LONG = (
    Fact(
        "Sluice is a serving gateway for large language models. When a model is too large or too slow for"
        " one device, Sluice splits it over several processes and lets them answer together. One line in"
        " model-config.yaml, parallelType, chooses how: tp splits every layer, pp gives each process some of"
        " the layers, pptp does both, and custom leaves the placement to a single process. A request comes"
        " in over HTTP, in the format of OpenAI. The gateway checks it, turns its text into tokens and sends"
        " them to a worker group. There the leader makes a plan for every step, and all ranks execute it."
        " With continuous batching, new requests join at every step, and with the prefix cache a shared"
        " beginning is computed only once. The tokens come back, become text, and are streamed to the"
        " client. If a process dies, the group is started again.",
        questions=(
            "Tell me everything about Sluice.",
            "Write a long text about Sluice.",
            "Tell me more about Sluice.",
            "Give me a long explanation of Sluice.",
            "Explain Sluice in detail.",
            "Describe Sluice in detail.",
            "Write an essay about Sluice.",
            "Give me an overview of Sluice.",
            "Summarize Sluice.",
            "Write a paragraph about Sluice.",
            "Tell me a story about Sluice.",
            "What are the features of Sluice?",
        ),
    ),
    Fact(
        "Here is how tensor parallelism works in a transformer layer. First, each device holds some of the"
        " attention heads and computes their queries, keys and values. Second, it multiplies the result by"
        " its rows of the output matrix. Third, an all-reduce adds the partial results of all devices. Then"
        " the feed-forward part does the same: the first matrix is split by columns, the second by rows, and"
        " a second all-reduce adds the parts. So each layer needs two all-reduces, and each device reads"
        " only its share of the weights.",
        questions=(
            "How does tensor parallelism work in detail?",
            "Explain tensor parallelism in detail.",
            "Explain tensor parallelism step by step.",
            "How is a layer split by tensor parallelism?",
            "Give me a long explanation of tensor parallelism.",
            "Tell me more about tensor parallelism.",
            "How does tensor parallelism work inside a layer?",
            "Describe tensor parallelism step by step.",
        ),
    ),
    Fact(
        "Here is how pipeline parallelism works. The layers of the model are divided into stages, and each"
        " stage lives on its own device. A batch enters the first stage, which computes its layers and sends"
        " the hidden states to the second stage. While the second stage works, the first one can take the"
        " next batch. The last stage computes the scores and samples the tokens, and they go back to the"
        " first stage for the next step. With only one request most stages would wait, so several"
        " micro-batches are kept in flight.",
        questions=(
            "How does pipeline parallelism work in detail?",
            "Explain pipeline parallelism in detail.",
            "Explain pipeline parallelism step by step.",
            "Tell me more about pipeline parallelism.",
            "Give me a long explanation of pipeline parallelism.",
            "How do pipeline stages work together?",
            "Describe pipeline parallelism step by step.",
        ),
    ),
    Fact(
        "Here is how continuous batching works. Each request is a sequence with a number of computed tokens."
        " In each step the scheduler first gives every running sequence a place in the batch, then it admits"
        " waiting sequences while there is room. A sequence that still has prompt tokens computes a piece of"
        " its prompt, and the others compute one token. When a sequence ends, its blocks are free for the"
        " next one in the same moment. If the blocks run out, the youngest sequence steps back and is"
        " computed again later.",
        questions=(
            "How does continuous batching work in detail?",
            "Explain continuous batching in detail.",
            "Explain continuous batching step by step.",
            "Tell me more about continuous batching.",
            "How does the scheduler work in detail?",
            "Describe continuous batching step by step.",
        ),
    ),
    Fact(
        "Here is a small model-config.yaml for two processes with tensor parallelism:\n\nminWorkers: 1\n"
        "maxWorkers: 1\nparallelType: tp\ntorchrun:\n  nproc-per-node: 2\nstartupTimeout: 120\nhandler:\n"
        "  model_path: /models/llama\n\nSave it and run sluice serve model-config.yaml.",
        questions=(
            "Show me an example of model-config.yaml.",
            "Give me an example configuration.",
            "Show me a configuration file.",
            "What does a model-config.yaml look like?",
            "Write a model-config.yaml for tensor parallelism.",
            "Can you show me an example of a configuration?",
            "Show me a YAML example.",
            "I need an example of a configuration file.",
        ),
    ),
    Fact(
        "Here is how to call Sluice from Python:\n\nfrom openai import OpenAI\n\nclient ="
        ' OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")\nanswer ='
        ' client.chat.completions.create(\n    model="sluice-demo",\n    messages=[{"role": "user",'
        ' "content": "Hello!"}],\n)\nprint(answer.choices[0].message.content)',
        questions=(
            "How do I call Sluice from Python?",
            "Show me a Python example.",
            "Give me a Python example.",
            "Show me an example in Python.",
            "How do I use Sluice from Python?",
            "Write a Python example for Sluice.",
            "Show me Python code that calls Sluice.",
            "How can I use the API with Python?",
            "Python example please",
        ),
    ),
    Fact(
        "The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
        questions=(
            "What are the days of the week?",
            "List the days of the week.",
            "Name the days of the week.",
            "Tell me the days of the week.",
            "Which days does a week have?",
            "Can you list the days of the week?",
        ),
    ),
    Fact(
        "The months of the year are January, February, March, April, May, June, July, August, September,"
        " October, November and December.",
        questions=(
            "What are the months of the year?",
            "List the months.",
            "Name the months of the year.",
            "Tell me the months of the year.",
            "Which months does a year have?",
            "Can you list the months of the year?",
        ),
    ),
    Fact(
        "The letters of the alphabet are A, B, C, D, E, F, G, H, I, J, K, L, M, N, O, P, Q, R, S, T, U, V,"
        " W, X, Y and Z.",
        questions=(
            "What is the alphabet?",
            "Say the alphabet.",
            "List the letters of the alphabet.",
            "Recite the alphabet.",
            "Tell me the alphabet.",
            "What are the letters of the alphabet?",
            "Can you say the alphabet?",
        ),
    ),
    Fact(
        "Some colours are red, orange, yellow, green, blue, purple, black and white.",
        questions=(
            "Name some colours.",
            "Name some colors.",
            "List some colors.",
            "Tell me some colours.",
            "Give me a list of colors.",
            "Which colors do you know?",
        ),
    ),
)

FACTS = (*IDENTITY, *SMALL_TALK, *SLUICE, *PARALLELISM, *LONG)
