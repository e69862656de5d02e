import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
model = ChatOpenAI(model="SmolLM2-135M-Instruct", base_url=url, api_key="unused", temperature=0, max_tokens=32)
question = "What is the capital of France?"


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}."


class Answer(BaseModel):
    yes: bool


answer = model.invoke(question)
print("invoke:", answer.content, answer.usage_metadata["output_tokens"], "tokens")
print("stream:", "".join(f"[{chunk.content}]" for chunk in model.stream(question)))
print("batch:", [answer.content for answer in model.batch(["Say hello.", "Say goodbye."])])

asked = HumanMessage("How is the weather in Paris?")
called = model.bind_tools([get_weather], tool_choice="get_weather").invoke([asked])
[call] = called.tool_calls
print("tool call:", call["name"], call["args"])
result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
print("with its result:", model.invoke([asked, called, result]).content)
print("structured:", model.with_structured_output(Answer).invoke("Is Paris in France?"))
