//! Linear layers, norms, gated units and AdamW: the kernels against the same formula in tensor operations, in f64.

#[macro_use]
mod common;

use burn::Tensor;
use burn::tensor::DType;
use common::*;
use thalweg_scan::{self as scan, AdamWOutput, AdamWStep, GluActivation, Path};

on_each_device!(linear_layers, norms, gated_units, adamw);

/// Values of `f` and its gradients with respect to `leaves`, natively in `dtype` and portably in f64 on the same values.
macro_rules! compare {
    ($what:expr, [$($leaf:ident),+], $dtype:expr, $tolerance:expr, |$path:ident| $f:expr) => {{
        // A GPU may not know f64; both sides run in f32 there.
        let exact = if computes(DType::F64) { DType::F64 } else { DType::F32 };
        let run = |$path: Path, dtype: DType| {
            $(let $leaf = leaf(values(&$leaf), $leaf.dims(), dtype);)+
            let y = $f.expect("valid arguments");
            let cotangent = Random::new(3).tensor(y.dims(), -1.0, 1.0, y.dtype()).detach();
            let gradients = (y.clone() * cotangent).sum().backward();
            vec![values(&y), $(gradient(&$leaf, &gradients)),+]
        };
        for (n, (found, expected)) in run(Path::Auto, $dtype).iter().zip(run(Path::Portable, exact)).enumerate() {
            let name = ["y", $(stringify!($leaf)),+][n];
            assert_close(&format!("{} {name}", $what), found, &expected, $tolerance);
        }
    }};
}

/// The storage types of a kernel, with what they round off.
fn types() -> impl Iterator<Item = (DType, f64)> {
    [(DType::F32, 2e-6), (DType::BF16, 2e-2)].into_iter().filter(|(dtype, _)| computes(*dtype))
}

fn linear_layers() {
    for (dtype, tolerance) in types() {
        // Few rows and many take different ways through the kernel.
        for time in [1, 20, 50] {
            let mut random = Random::new(time as u64);
            let x: Tensor<3> = random.tensor([2, time, 24], -1.0, 1.0, dtype);
            let w: Tensor<2> = random.tensor([24, 7], -0.3, 0.3, dtype);
            let b: Tensor<1> = random.tensor([7], -1.0, 1.0, dtype);
            compare!("linear", [x, w, b], dtype, tolerance, |path| scan::linear(
                x.clone(),
                w.clone(),
                Some(b.clone()),
                path
            ));
            let w: Tensor<2> = random.tensor([7, 24], -0.3, 0.3, dtype);
            compare!("linear, transposed", [x, w, b], dtype, tolerance, |path| {
                scan::linear(x.clone(), w.clone().transpose(), Some(b.clone()), path)
            });
            let w: Tensor<3> = random.tensor([3, 8, 5], -0.3, 0.3, dtype);
            let b: Tensor<2> = random.tensor([3, 5], -1.0, 1.0, dtype);
            compare!("blocks", [x, w, b], dtype, tolerance, |path| {
                scan::block_linear(x.clone(), w.clone(), Some(b.clone()), path)
            });
        }
    }
    let x: Tensor<3> = Random::new(1).tensor([2, 20, 24], -1.0, 1.0, DType::F32);
    let w = |shape: [usize; 2]| Random::new(2).tensor::<2>(shape, -1.0, 1.0, DType::F32);
    let error = scan::linear(x.clone(), w([23, 7]), None, Path::Auto).unwrap_err();
    assert_eq!(error.to_string(), "`weight` has shape [23, 7], expected [inputs=24, outputs=7]");
    let error = scan::block_linear(x, w([24, 7]).reshape([3, 7, 8]), None, Path::Auto).unwrap_err();
    assert_eq!(error.to_string(), "`x` has shape [2, 20, 24], expected [batch=2, time=20, blocks * inputs=21]");
}

fn norms() {
    for (dtype, tolerance) in types() {
        let mut random = Random::new(5);
        let x: Tensor<3> = random.tensor([3, 41, 33], -2.0, 2.0, dtype);
        let z: Tensor<3> = random.tensor([3, 41, 33], -3.0, 3.0, dtype);
        let w: Tensor<1> = random.tensor([33], -1.0, 1.0, dtype);
        compare!("l2", [x], dtype, tolerance, |path| scan::l2_norm(x.clone(), 1e-6, path));
        for offset in [0.0, 1.0] {
            compare!("rms", [x, w], dtype, tolerance, |path| {
                scan::rms_norm(x.clone(), Some(w.clone()), offset, None, 1e-5, path)
            });
        }
        compare!("gated", [x, w, z], dtype, tolerance, |path| {
            scan::rms_norm(x.clone(), Some(w.clone()), 0.0, Some((GluActivation::Silu, z.clone())), 1e-5, path)
        });
    }
    // A row of zeros is a row of zeros, with a finite gradient.
    let zeros: Tensor<2> = leaf(vec![0.0; 4], [1, 4], DType::F32);
    let y = scan::l2_norm(zeros.clone(), 1e-6, Path::Auto).unwrap();
    assert_eq!(values(&y), [0.0; 4]);
    assert_close("slope", &gradient(&zeros, &y.sum().backward()), &[1000.0; 4], 1e-5);
    // 1e-50 is 0 in f32; the row stays one of zeros.
    for path in [Path::Auto, Path::Portable] {
        let y = scan::rms_norm(zeros.clone(), None, 0.0, None, 1e-50, path).unwrap();
        assert_eq!(values(&y), [0.0; 4], "{path:?}");
    }
    for eps in [-1.0, f64::NAN, 1e50] {
        let error = scan::l2_norm(zeros.clone(), eps, Path::Auto).unwrap_err();
        assert!(matches!(error, scan::Error::Value { argument: "eps", .. }), "{error}");
    }
}

fn gated_units() {
    for (dtype, tolerance) in types() {
        let mut random = Random::new(6);
        let [x, z]: [Tensor<2>; 2] = [0; 2].map(|_| random.tensor([300, 70], -6.0, 6.0, dtype));
        for f in [GluActivation::Sigmoid, GluActivation::Silu, GluActivation::GeluTanh] {
            compare!(format!("{f:?}"), [x, z], dtype, tolerance, |path| scan::glu(f, x.clone(), Some(z.clone()), path));
        }
    }
}

fn adamw() {
    let mut random = Random::new(8);
    let shape = [37, 41];
    let [p, g, other]: [Tensor<2>; 3] = [0; 3].map(|_| random.tensor(shape, -1.0, 1.0, DType::F32).detach());
    let step = |time| AdamWStep { lr: 0.05, betas: (0.9, 0.95), epsilon: 1e-8, weight_decay: 0.1, time };
    let before = values(&p);
    let two_steps = |path| {
        let AdamWOutput { p, m, v } = scan::adamw(&step(1), p.clone(), g.clone(), None, path).expect("valid");
        scan::adamw(&step(2), p, other.clone(), Some([m, v]), path).expect("valid")
    };
    let (found, expected) = (two_steps(Path::Auto), two_steps(Path::Portable));
    for (name, a, b) in [("p", found.p, expected.p), ("m", found.m, expected.m), ("v", found.v, expected.v)] {
        assert_close(name, &values(&a), &values(&b), 1e-5);
    }
    // What others hold is left alone.
    assert_eq!(values(&p), before);
    let error = scan::adamw(&step(1), p, g.reshape([41, 37]), None, Path::Auto).unwrap_err();
    assert_eq!(error.to_string(), "`g` has shape [41, 37], expected that of p, [37, 41]");
    assert!(scan::adamw(&step(0), other.clone(), other.clone(), None, Path::Auto).is_err());
    for betas in [(1.0, 0.95), (0.9, f32::NAN), (-0.1, 0.95)] {
        let error = scan::adamw(&AdamWStep { betas, ..step(1) }, other.clone(), other.clone(), None, Path::Portable);
        assert!(error.unwrap_err().to_string().starts_with("`betas` is "), "{betas:?}");
    }
    // In 16 bits: a gradient of 0 (its root is divided by epsilon, which is 0 in f16) and one whose square is 0.
    for dtype in [DType::BF16, DType::F16].into_iter().filter(|dtype| computes(*dtype)) {
        let [p, g] = [[1.0, 2.0, 3.0], [0.0, 1e-6, -4.0]].map(|x| {
            let x: Tensor<1> = leaf(x.to_vec(), [3], dtype);
            x.detach()
        });
        let plain = AdamWStep { weight_decay: 0.0, ..step(1) };
        let first = scan::adamw(&plain, p, g.clone(), None, Path::Auto).expect("valid");
        let second = scan::adamw(&step(2), first.p.clone(), g, Some([first.m, first.v]), Path::Auto).expect("valid");
        assert_eq!((first.p.dtype(), second.m.dtype()), (dtype, DType::F32));
        // The first step is as long as the learning rate, but for epsilon beside the root of the smallest.
        assert_close("16 bits", &values(&first.p), &[1.0, 1.95 + 0.05 / 101.0, 3.05], 3e-3);
        assert!(values(&second.p).iter().all(|x| x.is_finite()));
    }
}
