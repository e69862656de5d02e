import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2] ?? "http://127.0.0.1:8000/v1", apiKey: "unused" });
const model = "SmolLM2-135M-Instruct";
const question = { model, messages: [{ role: "user", content: "What is the capital of France?" }], temperature: 0, max_tokens: 32 };
const tool = {
  type: "function",
  function: {
    name: "get_weather",
    parameters: { type: "object", properties: { city: { enum: ["Paris", "Rome"] } }, required: ["city"], additionalProperties: false },
  },
};

const completion = await client.chat.completions.create(question);
console.log("create:", completion.choices[0].message.content);

const stream = await client.chat.completions.create({ ...question, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  process.stdout.write(chunk.choices.length ? `[${chunk.choices[0].delta.content ?? ""}]` : ` ${chunk.usage.completion_tokens} tokens\n`);
}

const helper = client.chat.completions.stream({ ...question, tools: [tool], tool_choice: "required", parallel_tool_calls: false });
const call = await helper.finalFunctionToolCall();
console.log("tool call:", call.name, call.arguments);

const format = { type: "json_schema", json_schema: { name: "city", strict: true, schema: tool.function.parameters } };
const parsed = await client.chat.completions.parse({ ...question, response_format: format });
console.log("json_schema:", parsed.choices[0].message.content);

const again = () => client.chat.completions.create(question, { headers: { "Idempotency-Key": "node-1" } });
console.log("same key, same answer:", (await again()).id === (await again()).id);

try {
  await client.chat.completions.create({ ...question, temperature: 3 });
} catch (error) {
  console.log(error.constructor.name, error.status, error.param, "-", error.message);
}
