// Finds and connects peers with Hyperswarm on a testnet of its own on 127.0.0.1: one JSON line in, one out.
//   {servers: N}  announces so many servers on a new topic, in place of those before, until they are flushed: {}
//   {find: true}  a new client, to its connections: {found, first, all} in ms since its opening
//   {lookup: true}  a new DHT node's lookups alone, without connections: the same
import {randomBytes} from "node:crypto";
import {createInterface} from "node:readline";
import DHT from "hyperdht";
import createTestnet from "hyperdht/testnet.js";
import Hyperswarm from "hyperswarm";

const HOST = "127.0.0.1";
const PATIENCE_MS = 20_000; // what has not been found by then never will be
const testnet = await createTestnet(10, {host: HOST}); // ten is the testnet's own default
let topic = randomBytes(32);
let servers = [];

function node() {
    return new DHT({bootstrap: testnet.bootstrap, host: HOST, ephemeral: true});
}

async function serve(count) {
    await Promise.all(servers.map(server => server.destroy()));
    topic = randomBytes(32);
    servers = Array.from({length: count}, () => new Hyperswarm({dht: node()}));
    for (const server of servers) {
        server.on("connection", connection => connection.on("error", () => {}));
        await server.join(topic, {server: true, client: false}).flushed();
    }
    return {};
}

// Notes when each key was first seen; `done` settles at the last or when patience ends.
function watch(count) {
    const started = performance.now();
    const times = new Map();
    let end;
    const done = new Promise(resolve => end = resolve);
    const timer = setTimeout(end, PATIENCE_MS);
    const saw = key => {
        const name = key.toString("hex");
        if (!times.has(name))
            times.set(name, performance.now() - started);
        if (times.size >= count)
            end();
    };
    const over = () => times.size >= count || performance.now() - started > PATIENCE_MS;
    const report = () => {
        clearTimeout(timer);
        const sorted = [...times.values()];
        return {found: sorted.length, first: sorted[0] ?? null, all: sorted.length >= count ? sorted.at(-1) : null};
    };
    return {saw, over, done, report};
}

async function find() {
    const {saw, over, done, report} = watch(servers.length);
    const client = new Hyperswarm({dht: node()});
    client.on("connection", connection => {
        connection.on("error", () => {});
        saw(connection.remotePublicKey);
    });
    const discovery = client.join(topic, {server: false, client: true});
    await discovery.flushed();
    while (client.peers.size < servers.length && !over())
        await discovery.refresh(); // a lookup gives a sample of each node's records; by itself it looks again in 10 min
    await done;
    const told = report();
    await client.destroy();
    return told;
}

async function lookup() {
    const {saw, over, report} = watch(servers.length);
    const client = node();
    while (!over())
        for await (const {peers} of client.lookup(topic))
            for (const {publicKey} of peers)
                saw(publicKey);
    const told = report();
    await client.destroy();
    return told;
}

console.log("{}");
for await (const line of createInterface({input: process.stdin})) {
    const asked = JSON.parse(line);
    const answer = asked.servers ? await serve(asked.servers) : asked.find ? await find() : await lookup();
    console.log(JSON.stringify(answer));
}
process.exit(0);
