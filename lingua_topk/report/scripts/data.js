// The data inside the page. A chunk is compressed and in base64; chunks.py says what is in it.

const meta = JSON.parse(document.getElementById("meta").textContent);
const TYPES = {
  i1: Int8Array,
  u1: Uint8Array,
  i2: Int16Array,
  u2: Uint16Array,
  i4: Int32Array,
  u4: Uint32Array,
  f4: Float32Array,
};
const ALIGNMENT = 8;
const MOST_CHUNKS = 24; // that stay unpacked
const unpacked = new Map();

/** The values and typed arrays of a chunk by name; those used last are kept. */
function chunk(name) {
  const found = unpacked.get(name) ?? unpack(name);
  unpacked.delete(name);
  unpacked.set(name, found);
  if (unpacked.size > MOST_CHUNKS) unpacked.delete(unpacked.keys().next().value);
  return found;
}

async function unpack(name) {
  if (!("DecompressionStream" in window)) {
    throw new Error(
      "This browser cannot unpack the report's data (it lacks DecompressionStream): use Chrome or" +
        " Edge 80, Firefox 113, Safari 16.4, or a later one.",
    );
  }
  const packed = bytesOf(document.getElementById(`chunk-${name}`).textContent);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return readChunk(await new Response(stream).arrayBuffer());
}

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

function readChunk(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const begin = Math.ceil((4 + length) / ALIGNMENT) * ALIGNMENT;
  const found = { ...header.values };
  for (const [name, { type, shape, at }] of Object.entries(header.arrays)) {
    const size = shape.reduce((product, n) => product * n, 1);
    found[name] = new TYPES[type](buffer, begin + at, size);
    found[name].shape = shape;
  }
  return found;
}

/** Row i of an array whose first dimension counts rows. */
function rowOf(array, i) {
  const width = array.length / array.shape[0];
  return array.subarray(i * width, (i + 1) * width);
}

// Neurons are numbered through: those of the first layer in the report, then of the next.

const nNeurons = meta.layers.reduce((sum, layer) => sum + layer.width, 0);
let table = null; // the chunk of that name, once it is unpacked

function layerOf(number) {
  return meta.layers.findLast((layer) => layer.first <= number);
}

function nameOf(number) {
  const layer = layerOf(number);
  return `${layer.index}:${number - layer.first}`;
}

/** The number of a neuron called 3:417, or -1. */
function numberOf(name) {
  const found = /^(\d+):(\d+)$/.exec(name);
  const layer = found && meta.layers.find((one) => one.index === Number(found[1]));
  if (!layer || Number(found[2]) >= layer.width) return -1;
  return layer.first + Number(found[2]);
}

/** Everything about one neuron: its rows of the chunk it lies in. */
async function neuronData(number) {
  const layer = layerOf(number);
  const index = number - layer.first;
  const all = await chunk(`${layer.index}-${Math.floor(index / meta.neuronsAChunk)}`);
  const i = index % meta.neuronsAChunk;
  const found = { layer, index, number, words: all.words[i], count: all.counts[i] };
  for (const [name, array] of Object.entries(all)) {
    if (array.shape?.length > 1) found[name] = rowOf(array, i);
  }
  if (all.context_values) found.window = all.context_values.shape[2];
  if (all.trace_settled) found.settled = all.trace_settled[i];
  meta.numbers.forEach((name, j) => (found[name] = found.numbers[j]));
  return found;
}
