// The server's API, as the page uses it. All addresses are relative, so that the page works behind a proxy.

/** The response, if it is a good one; else an error with the server's message. */
export async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new Error(body.error?.message ?? `HTTP ${response.status}`);
}

function headers(key) {
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

/** The server's model. */
export async function model(key) {
  const list = await (await checked(await fetch("v1/models", { headers: headers(key) }))).json();
  return list.data[0];
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

/** The events of a streamed chat completion; ``signal`` ends it. */
export async function* chat(body, key, signal) {
  const stream = { ...body, stream: true, stream_options: { include_usage: true } };
  const request = { method: "POST", headers: headers(key), body: JSON.stringify(stream), signal };
  for await (const event of events(await checked(await fetch("v1/chat/completions", request)))) {
    if (event.error) throw new Error(event.error.message);
    yield event;
  }
}

/** The values of /metrics by name; those with labels are left out. */
export async function metrics() {
  const values = {};
  for (const line of (await (await checked(await fetch("metrics"))).text()).split("\n")) {
    const [name, value] = line.split(" ");
    if (name && !line.startsWith("#") && !name.includes("{")) values[name.replace("atom_jax_", "")] = Number(value);
  }
  return values;
}
