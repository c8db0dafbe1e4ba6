"""langchain-openai against a server: python langchain_client.py URL. Needs langchain-openai."""

import sys

from langchain_openai import ChatOpenAI, OpenAI

url, question = sys.argv[1], "What is 34 + 58?"
options = dict(base_url=f"{url}/v1", api_key="none", model="gemmakit-demo", temperature=0, max_retries=0)
chat = ChatOpenAI(**options)
said = chat.invoke(question)
print("invoke:", repr(said.content), said.usage_metadata)
streamed = "".join(chunk.content for chunk in chat.stream(question))
assert streamed == said.content == "34 + 58 = 92", streamed
print("stream:", repr(streamed))
batch = chat.batch([question, "What is 7 + 58?"])
assert batch[0].content == said.content
print("batch:", [one.content for one in batch])
scored = chat.bind(logprobs=True, top_logprobs=2).invoke(question)
assert len(scored.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
schema = {
    "title": "Sum",
    "type": "object",
    "properties": {"sum": {"type": "integer", "maximum": 999}},
    "required": ["sum"],
    "additionalProperties": False,
}
print("structured:", chat.with_structured_output(schema, method="json_schema").invoke(question))
responses = ChatOpenAI(**options, use_responses_api=True).invoke(question)
assert responses.text == said.content, responses
print("completion:", repr(OpenAI(**options, max_tokens=8).invoke("If the file")))
print("langchain-openai: all as expected")
