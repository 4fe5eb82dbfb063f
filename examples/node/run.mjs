// Answers samples in Node.js with a model that `driftkeel export --generation N` wrote.
//
//   node run.mjs model.onnx images.npy
//
// The images are a .npy array uint8 [n, s, s, 3], or raw bytes of the same; RGB, of the size that
// the model's metadata says. Prints JSON: what the model is, and one answer for each image.
import { readFileSync } from 'node:fs'
import ort from 'onnxruntime-node'
import { metadataOf } from './metadata.mjs'

function readImages(path, size) {
  const file = readFileSync(path)
  let pixels = file
  let shape = [file.length / (size * size * 3), size, size, 3]
  if (file.subarray(0, 6).toString('latin1') === '\x93NUMPY') {
    const wide = file[6] > 1
    const start = wide ? 12 : 10
    const end = start + (wide ? file.readUInt32LE(8) : file.readUInt16LE(8))
    const header = file.subarray(start, end).toString('latin1')
    if (!/'descr': '\|u1'/.test(header) || !/'fortran_order': False/.test(header)) {
      throw new Error(`${path} is not a plain uint8 array: ${header.trim()}`)
    }
    shape = /'shape': \(([^)]*)\)/.exec(header)[1].split(',').map((axis) => axis.trim())
    shape = shape.filter((axis) => axis !== '').map(Number)
    pixels = file.subarray(end)
  }
  const [count, ...rest] = shape
  const fits = pixels.length === count * size * size * 3 && rest.join() === [size, size, 3].join()
  if (!Number.isInteger(count) || count < 1 || !fits) {
    throw new Error(
      `${path} has ${pixels.length} values of shape [${shape}], expected [n, ${size}, ${size}, 3]`,
    )
  }
  return new ort.Tensor('uint8', new Uint8Array(pixels), shape)
}

async function answers(modelPath, imagesPath) {
  const about = metadataOf(modelPath)
  const { size } = JSON.parse(about['driftkeel.preprocessing'])
  const bundles = JSON.parse(about['driftkeel.bundles'])
  const images = readImages(imagesPath, size)
  const session = await ort.InferenceSession.create(modelPath)
  const found = await session.run({ images })
  const labels = found.probabilities.dims[1]
  return {
    generation: Number(about['driftkeel.generation']),
    encoder: about['driftkeel.encoder'],
    labels: JSON.parse(about['driftkeel.labels']),
    samples: Array.from(found.label_name.data, (label, row) => ({
      label,
      probability: found.probabilities.data[row * labels + Number(found.label.data[row])],
      adapter: found.adapter.data[row] < 0 ? null : bundles[Number(found.adapter.data[row])],
      // Of a model without a score there is none.
      ood_score: found.ood_score?.data[row] ?? null,
      ood_p_value: found.ood_p_value?.data[row] ?? null,
    })),
  }
}

const [modelPath, imagesPath] = process.argv.slice(2)
if (!imagesPath) {
  console.error('usage: node run.mjs MODEL.onnx IMAGES')
  process.exit(2)
}
try {
  console.log(JSON.stringify(await answers(modelPath, imagesPath)))
} catch (error) {
  console.error(`run.mjs: ${error.message}`)
  process.exit(1)
}
