// Runs prompts on node-llama-cpp: one JSON line {prompts, tokens} in, one line with each token's time in ms out.
import {createInterface} from "node:readline";
import {getLlama} from "node-llama-cpp";

const [modelPath, slots, contextSize, threads] = [process.argv[2], ...process.argv.slice(3).map(Number)];
const llama = await getLlama({gpu: false, build: "never", maxThreads: threads, progressLogs: false});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({sequences: slots, contextSize, threads});
const sequences = Array.from({length: slots}, () => context.getSequence());

async function answer(sequence, prompt, tokens, started) {
    const times = [];
    await sequence.clearHistory();
    for await (const token of sequence.evaluate(model.tokenize(prompt), {temperature: 0})) {
        model.detokenize([token]);
        if (times.push(performance.now() - started) >= tokens)
            break;
    }
    return times;
}

console.log("{}");
for await (const line of createInterface({input: process.stdin})) {
    const {prompts, tokens} = JSON.parse(line);
    const started = performance.now();
    console.log(JSON.stringify(await Promise.all(
        prompts.map((prompt, index) => answer(sequences[index], prompt, tokens, started))
    )));
}
process.exit(0);
