// What an ONNX file says of itself, by key: onnxruntime-node does not hand it on.
//
// An ONNX file is one protocol-buffer message; its metadata are the entries of field 14, each a
// message of a key (field 1) and a value (field 2). Everything else is passed over unread.
import { readFileSync } from 'node:fs'

const METADATA_PROPS = 14

function varint(bytes, at) {
  let value = 0
  for (let scale = 1; ; scale *= 128) {
    const byte = bytes[at++]
    if (byte === undefined) throw new Error('this is not a whole ONNX file')
    value += (byte % 128) * scale
    if (byte < 128) return [value, at]
  }
}

function* fields(bytes) {
  for (let at = 0; at < bytes.length; ) {
    let tag, size
    ;[tag, at] = varint(bytes, at)
    const kind = tag % 8
    if (kind === 0) [, at] = varint(bytes, at)
    else if (kind === 1) at += 8
    else if (kind === 5) at += 4
    else if (kind === 2) {
      ;[size, at] = varint(bytes, at)
      yield [Math.floor(tag / 8), bytes.subarray(at, at + size)]
      at += size
    } else throw new Error('this is not an ONNX file')
  }
}

export function metadataOf(path) {
  const found = {}
  for (const [number, entry] of fields(readFileSync(path))) {
    if (number !== METADATA_PROPS) continue
    const { 1: key, 2: value } = Object.fromEntries(fields(entry))
    found[key.toString('utf8')] = value?.toString('utf8') ?? ''
  }
  if (!('driftkeel.preprocessing' in found)) {
    throw new Error(`${path} is no model that \`driftkeel export --generation\` wrote`)
  }
  return found
}
