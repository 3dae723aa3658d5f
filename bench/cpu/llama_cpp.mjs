// llama.cpp as the process that protocol.py describes.
//
//     node llama_cpp.mjs FOLDER_OF_NODE_MODULES MODEL.gguf THREADS
//
// Only llama_decode is in the times: no sampling, and a fixed token follows each, since the time of a step does
// not depend on which one it is. Logits of the last token of each sequence are computed, as sampling needs
// them. The object behind node-llama-cpp's context is called, not its queue of batches, so that what is one
// batch is decided here: all prompts in batches of BATCH_TOKENS, then one token of each sequence in one batch.

import path from "node:path";
import readline from "node:readline";
import {pathToFileURL} from "node:url";

const BATCH_TOKENS = 512;  // llama.cpp's own default
const CELLS_OF_A_CONTEXT = {1: 2304, 16: 128};  // tokens of each sequence, by the number of sequences

const [folder, modelPath, threadCount] = process.argv.slice(2);
const threads = Number(threadCount);
const library = path.join(folder, "node_modules", "node-llama-cpp", "dist", "index.js");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(library));

const log = [];
const llama = await getLlama({
    gpu: false,
    build: "never",
    progressLogs: false,
    maxThreads: threads,
    logLevel: LlamaLogLevel.debug,
    logger: (level, message) => log.push(...message.split("\n"))
});
const model = await llama.loadModel({modelPath});
const contexts = {};
for (const [sequences, contextSize] of Object.entries(CELLS_OF_A_CONTEXT))
    contexts[sequences] = await model.createContext({
        sequences: Number(sequences), contextSize, batchSize: BATCH_TOKENS, threads
    });

// One batch: for each of the sequences, tokens from a position on. Returns nothing; logits stay in llama.cpp.
async function decode(context, parts) {
    context.initBatch(parts.reduce((sum, {tokens}) => sum + tokens.length, 0));
    for (const {sequence, position, tokens, last} of parts)
        context.addToBatch(
            sequence, position, Uint32Array.from(tokens), Uint32Array.from(last ? [tokens.length - 1] : [])
        );
    await context.decodeBatch();
}

async function prefill(context, prompts) {
    let parts = [], free = BATCH_TOKENS;
    for (const [sequence, prompt] of prompts.entries())
        for (let position = 0; position < prompt.length;) {
            const tokens = prompt.slice(position, position + free);
            const last = position + tokens.length === prompt.length;
            parts.push({sequence, position, tokens, last});
            position += tokens.length;
            free -= tokens.length;
            if (free === 0) {
                await decode(context, parts);
                parts = [];
                free = BATCH_TOKENS;
            }
        }
    if (parts.length > 0)
        await decode(context, parts);
}

async function generate({prompts, new_tokens: newTokens}) {
    const context = contexts[prompts.length]?._ctx;
    if (context == null)
        throw new Error(`no context for ${prompts.length} sequences`);
    for (const sequence of prompts.keys())
        context.disposeSequence(sequence);
    context.setThreads(threads);
    const cpu = process.cpuUsage(), started = performance.now();
    await prefill(context, prompts);
    for (let step = 0; step < newTokens - 1; step++)
        await decode(context, prompts.map((prompt, sequence) => (
            {sequence, position: prompt.length + step, tokens: [prompt[0]], last: true}
        )));
    const seconds = (performance.now() - started) / 1e3, used = process.cpuUsage(cpu);
    return {seconds, cpu_seconds: (used.user + used.system) / 1e6};
}

llama.logLevel = LlamaLogLevel.error;  // no lines while times are taken
console.log(JSON.stringify({ready: {
    llama_cpp: llama.llamaCppRelease.release,
    system_info: llama.systemInfo,
    threads: contexts[1]._ctx.getThreads(),
    batch_tokens: BATCH_TOKENS,
    flash_attention: log.some((line) => line.includes("FLASH_ATTN_EXT")),  // an operation of its graph
    log: log.filter((line) => /loaded CPU backend|model buffer size|KV buffer size|n_seq_max|n_ctx_seq +=/.test(line))
        .map((line) => line.replace(/ from .*\//, " "))  // no paths of this machine
}}));
for await (const line of readline.createInterface({input: process.stdin}))
    console.log(JSON.stringify(await generate(JSON.parse(line))));
process.exit(0);
