//! Calls of the library's public functions that lead to every kind of kernel: each element type, gate and write, sizes
//! at and off the tiles, packed sequences, and tensors that need 64-bit addresses.

use thalweg_cuda_check::Recorder;
use thalweg_gpu::attention;
use thalweg_gpu::complex_scan::{self, ComplexInputs};
use thalweg_gpu::elementwise_scan::{self, ScanGate, ScanInputs};
use thalweg_gpu::matrix::{self, Gate, Inputs, Write};
use thalweg_gpu::rg_lru::{self, RgLruInputs};
use thalweg_gpu::short_conv;
use thalweg_gpu::{Buffer, Client, Storage};
use thalweg_kernels::ScanProblem;
use thalweg_kernels::attention::AttentionProblem;
use thalweg_kernels::complex_scan::Complex;
use thalweg_kernels::matrix::MatrixProblem;
use thalweg_kernels::short_conv::{Activation, ConvProblem};

/// Writes that every gate has kernels for.
const DENSE: [&str; 2] = ["additive", "delta"];
const WRITES: [&str; 3] = ["additive", "delta", "low-rank"];

/// All cases but those of [`tf32`].
pub fn all(recorder: &Recorder) {
    let scan = ScanProblem::new(2, 4096, 2048);
    for storage in [Storage::Bf16, Storage::F16, Storage::F32] {
        scans(recorder, "", &scan, storage);
    }
    scans(recorder, "few", &ScanProblem::new(1, 4096, 1024), Storage::Bf16);
    scans(recorder, "short", &ScanProblem::new(8, 1, 2048), Storage::Bf16);
    scans(recorder, "odd", &ScanProblem::new(1, 4096, 7), Storage::Bf16);
    scans(recorder, "packed", &ScanProblem::packed(2048, vec![0, 70, 4096]), Storage::Bf16);
    scans(recorder, "64-bit", &ScanProblem::new(8, 1 << 18, 2048), Storage::Bf16);
    matrices(recorder);
    let heads = |head_dim| AttentionProblem::new(4, 1000, 16, head_dim);
    for head_dim in [64, 128, 256, 12] {
        attention(recorder, "", &heads(head_dim), Storage::Bf16);
    }
    attention(recorder, "", &heads(128), Storage::F16);
    attention(recorder, "", &heads(64), Storage::F32);
    attention(recorder, "", &heads(128), Storage::F32);
    attention(recorder, "64-bit", &AttentionProblem::new(32, 1 << 16, 16, 128), Storage::Bf16);
}

/// Forward and backward. Lengths, windows and groups of heads are known at launch.
fn attention(recorder: &Recorder, note: &str, p: &AttentionProblem, storage: Storage) {
    recorder.case(format!("attention {} {storage:?} {note}", p.key_dim).trim_end(), |client| {
        let x = buffer(client, storage, p.batch * p.time * p.heads * p.key_dim);
        let inputs = attention::Inputs { q: &x, k: &x, v: &x };
        let out = attention::forward(client, p, &inputs).expect("the sizes agree");
        attention::backward(client, p, &inputs, &out, &x).expect("the sizes agree");
    });
}

/// Matrix units with f32 tensors: what [`thalweg_gpu::Options::tf32`] changes.
pub fn tf32(recorder: &Recorder) {
    let p = MatrixProblem::new(16, 1000, 16, 128, 128);
    for gate in ["none", "head", "key"] {
        for write in DENSE {
            matrix(recorder, "tf32", &p, Storage::F32, gate, write);
        }
    }
    matrix(recorder, "tf32", &p, Storage::F32, "key", "low-rank");
    attention(recorder, "tf32", &AttentionProblem::new(4, 1000, 16, 128), Storage::F32);
}

/// Every scan, forward and backward.
fn scans(recorder: &Recorder, note: &str, p: &ScanProblem, storage: Storage) {
    let len = p.batch * p.time * p.channels;
    let states = p.cu_seqlens.as_ref().map_or(p.batch, |bounds| bounds.len() - 1) * p.channels;
    let case = |name: &str, launches: &dyn Fn(&Client, &Buffer, &Buffer, &Buffer)| {
        recorder.case(format!("{name} {storage:?} {note}").trim_end(), |client| {
            let tokens = buffer(client, storage, len);
            let [channels, state] = [p.channels, states].map(|len| buffer(client, Storage::F32, len));
            launches(client, &tokens, &channels, &state);
        });
    };
    const AGREE: &str = "the sizes agree";
    case("scan", &|client, x, _, state| {
        for gate in [ScanGate::Linear(x), ScanGate::Log(x)] {
            let inputs = ScanInputs { gate, x, initial_state: Some(state) };
            elementwise_scan::forward(client, p, &inputs).expect(AGREE);
            elementwise_scan::backward(client, p, &inputs, x, x, Some(state)).expect(AGREE);
        }
    });
    case("short_conv", &|client, x, channels, _| {
        let weight = buffer(client, Storage::F32, 4 * p.channels);
        let problem = ConvProblem { shape: p.clone(), width: 4, activation: Activation::Silu };
        let state = buffer(client, Storage::F32, 3 * states);
        for (bias, state) in [(None, None), (Some(channels), Some(&state))] {
            let inputs = short_conv::Inputs { x, weight: &weight, bias, state };
            short_conv::forward(client, &problem, &inputs).expect(AGREE);
            short_conv::backward(client, &problem, &inputs, x, state).expect(AGREE);
        }
    });
    case("rg_lru", &|client, x, channels, state| {
        let starts = buffer(client, Storage::F32, p.batch * p.time);
        for reset in [None, Some(&starts)] {
            let initial_state = Some(state);
            let inputs = RgLruInputs { x, recurrent_gate: x, input_gate: x, a_param: channels, reset, initial_state };
            rg_lru::forward(client, p, &inputs).expect(AGREE);
            rg_lru::backward(client, p, &inputs, x, x, None).expect(AGREE);
        }
    });
    case("complex_scan", &|client, x, _, state| {
        let fixed = buffer(client, storage, p.channels);
        let (b, initial_state) = (Complex { re: x, im: x }, Some(Complex { re: state, im: state }));
        for lambda in [x, &fixed] {
            let inputs = ComplexInputs { log_a: lambda, theta: lambda, b, initial_state };
            complex_scan::forward(client, p, &inputs).expect(AGREE);
            complex_scan::backward(client, p, &inputs, b, b, None).expect(AGREE);
        }
    });
}

fn matrices(recorder: &Recorder) {
    // Enough sequences and heads to fill the device, so that a walk holds blocks of features as large as they get.
    let sizes = |key_dim, value_dim| MatrixProblem::new(16, 1000, 16, key_dim, value_dim);
    let usual = sizes(128, 128);
    for gate in ["none", "constant", "head", "key"] {
        for write in DENSE {
            matrix(recorder, "", &usual, Storage::Bf16, gate, write);
        }
    }
    // Those of a low-rank write are written out for each key feature.
    matrix(recorder, "", &usual, Storage::Bf16, "none", "low-rank");
    matrix(recorder, "", &usual, Storage::Bf16, "constant", "low-rank");
    let with_key_gates = |note, p: &MatrixProblem, storage| {
        let writes = if p.heads == p.value_heads { &WRITES[..] } else { &DENSE };
        for write in writes {
            matrix(recorder, note, p, storage, "key", write);
        }
    };
    for write in DENSE {
        matrix(recorder, "", &usual, Storage::F32, "head", write);
    }
    with_key_gates("", &usual, Storage::F32);
    with_key_gates("", &usual, Storage::F16);
    for (key_dim, value_dim) in [(64, 64), (256, 256), (20, 12)] {
        with_key_gates("", &sizes(key_dim, value_dim), Storage::Bf16);
    }
    let grouped = MatrixProblem { heads: 2, ..usual.clone() };
    let packed = MatrixProblem { batch: 1, cu_seqlens: Some(vec![0, 70, 1000]), ..usual.clone() };
    let large = MatrixProblem { batch: 8, time: 1 << 18, ..usual.clone() };
    with_key_gates("states", &usual, Storage::Bf16);
    with_key_gates("grouped", &grouped, Storage::Bf16);
    with_key_gates("packed", &packed, Storage::Bf16);
    with_key_gates("64-bit", &large, Storage::Bf16);
    // Where sequences are few, walks hold half or a quarter of the values.
    for (note, batch) in [("few", 3), ("one", 1)] {
        let p = MatrixProblem { batch, time: 65536, ..usual.clone() };
        with_key_gates(note, &p, Storage::Bf16);
        for write in DENSE {
            matrix(recorder, note, &p, Storage::Bf16, "head", write);
        }
    }
    with_key_gates("one", &MatrixProblem { batch: 1, time: 65536, ..usual.clone() }, Storage::F32);
    for storage in [Storage::Bf16, Storage::F32] {
        for gate in ["none", "constant", "head", "key"] {
            for write in WRITES {
                matrix(recorder, "step", &MatrixProblem { time: 1, ..usual.clone() }, storage, gate, write);
            }
        }
    }
}

/// Forward and backward, or a step.
fn matrix(recorder: &Recorder, note: &str, p: &MatrixProblem, storage: Storage, gate: &str, write: &str) {
    let name = format!("{gate} {write} {}x{} {storage:?} {note}", p.key_dim, p.value_dim);
    recorder.case(name.trim_end(), |client| {
        let len = |shape: &[usize]| shape.iter().product::<usize>();
        let [q, k, a, b] = [0; 4].map(|_| buffer(client, storage, len(&p.key_shape())));
        let v = buffer(client, storage, len(&p.value_shape()));
        let heads = p.batch * p.time * p.value_heads;
        let g = |len| buffer(client, Storage::F32, len);
        let (constant, head, key, beta) = (g(p.value_heads), g(heads), g(heads * p.key_dim), g(heads));
        let gate = match gate {
            "none" => Gate::None,
            "constant" => Gate::Constant(&constant),
            "head" => Gate::Head(&head),
            _ => Gate::Key(&key),
        };
        let write = match write {
            "additive" => Write::Additive,
            "delta" => Write::Delta { beta: &beta },
            _ => Write::LowRank { a: &a, b: &b },
        };
        let states = g(len(&p.state_shape()));
        if note == "step" {
            let x = Inputs { q: &q, k: &k, v: &v, gate, write, initial_state: None };
            matrix::step(client, p, &x, &states).expect("the sizes agree");
            return;
        }
        // A state that comes in, and the gradient of the one that goes out, are known when a kernel is compiled.
        let state = (note == "states").then_some(&states);
        let x = Inputs { q: &q, k: &k, v: &v, gate, write, initial_state: state };
        matrix::forward(client, p, &x).expect("the sizes agree");
        matrix::backward(client, p, &x, Some(&v), state).expect("the sizes agree");
    });
}

fn buffer(client: &Client, storage: Storage, len: usize) -> Buffer {
    Buffer::output(client, storage, len)
}
