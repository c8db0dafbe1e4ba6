// openai and @ai-sdk/openai-compatible against a server: node node_clients.mjs URL (npm install openai ai @ai-sdk/openai-compatible)
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import OpenAI from "openai";

const url = process.argv[2];
const question = "What is 34 + 58?";
const expected = "34 + 58 = 92";

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: question }];
const said = await client.chat.completions.create({ model: "gemmakit-demo", messages, temperature: 0 });
assert.equal(said.choices[0].message.content, expected);
let streamed = "";
const stream = await client.chat.completions.create({ model: "gemmakit-demo", messages, temperature: 0, stream: true });
for await (const chunk of stream) streamed += chunk.choices[0]?.delta?.content ?? "";
assert.equal(streamed, expected);
const response = await client.responses.create({ model: "gemmakit-demo", input: question, temperature: 0 });
assert.equal(response.output_text, expected);
await assert.rejects(client.chat.completions.create({ model: "gpt-9", messages }), OpenAI.NotFoundError);
console.log("openai (Node):", JSON.stringify(streamed), JSON.stringify(said.usage));

const provider = createOpenAICompatible({ name: "gemmakit", baseURL: `${url}/v1`, includeUsage: true });
const whole = await generateText({ model: provider("gemmakit-demo"), prompt: question, temperature: 0 });
assert.equal(whole.text, expected);
const { textStream, usage } = streamText({ model: provider("gemmakit-demo"), prompt: question, temperature: 0 });
let text = "";
for await (const piece of textStream) text += piece;
assert.equal(text, expected);
console.log("@ai-sdk/openai-compatible:", JSON.stringify(text), JSON.stringify(await usage));
