//! Generation takes the same memory at any position, and no step takes more than its neighbours.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use burn::tensor::{Device, Tensor};
use thalweg_layers::{Context, Mixer, MixerConfig, MixerState, Site};

/// Counts what is asked of the system's allocator.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static ASKED: AtomicUsize = AtomicUsize::new(0);

// Safety: whatever is asked goes to the allocator of the system.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Relaxed);
        ASKED.fetch_add(layout.size(), Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const HIDDEN: usize = 64;

/// Bytes that other threads of the process and the backend's own bookkeeping may add.
const SLACK: usize = 16 << 10;

/// `state` as if `position` tokens had been seen.
fn at(state: &MixerState, position: usize) -> MixerState {
    let mut state = state.clone();
    match &mut state {
        MixerState::Retnet(state) => state.positions.fill(position),
        MixerState::RgLru(state) => state.positions.fill(position),
        MixerState::Attention(state) => state.positions.fill(position),
        _ => {}
    }
    state
}

/// Bytes that a step asks for, bytes that it leaves behind, and bytes of the state after it.
fn step(mixer: &Mixer, x: &Tensor<2>, state: MixerState) -> (usize, usize, usize, MixerState) {
    let (live, asked) = (LIVE.load(Relaxed), ASKED.load(Relaxed));
    let (y, state) = mixer.step(x.clone(), state, &Context::default()).expect("a step");
    drop(y);
    let size = state.size_in_bytes();
    (ASKED.load(Relaxed) - asked, LIVE.load(Relaxed).saturating_sub(live), size, state)
}

/// One test: the counts are of the process.
#[test]
fn steps_take_the_same_memory_at_any_position() {
    let device = Device::flex();
    for kind in MixerConfig::KINDS {
        let json = match *kind {
            "attention" => r#"{"type": "attention", "num_heads": 2, "window": 24}"#.to_owned(),
            "hgrn2" => r#"{"type": "hgrn2", "expand_ratio": 16}"#.to_owned(),
            "hgrn" => r#"{"type": "hgrn"}"#.to_owned(),
            "gated_delta_net" | "kda" => format!(r#"{{"type": "{kind}", "num_heads": 2, "head_dim": 16}}"#),
            _ => format!(r#"{{"type": "{kind}", "num_heads": 2}}"#),
        };
        let config: MixerConfig = serde_json::from_str(&json).expect(kind);
        let mixer = config.init(&Site::new(HIDDEN), &device).expect(kind);
        let x = Tensor::<2>::ones([1, HIDDEN], &device);
        let mut state = mixer.forward(Tensor::ones([1, 40, HIDDEN], &device), None, &Context::default()).expect(kind).1;
        // What is made at first use: parameters, pools.
        for _ in 0..30 {
            state = step(&mixer, &x, state).3;
        }
        let (usual, _, size, _) = step(&mixer, &x, at(&state, 1_000));
        for power in [10, 11, 12, 16, 20] {
            for position in [(1 << power) - 1, 1 << power, (1 << power) + 1] {
                let (asked, left, bytes, _) = step(&mixer, &x, at(&state, position));
                assert_eq!(bytes, size, "{kind} at {position}: size of the state");
                assert!(asked < usual + SLACK, "{kind} at {position}: {asked} bytes instead of {usual}");
                assert!(left < size + SLACK, "{kind} at {position}: {left} bytes stay, the state has {size}");
            }
        }
    }
}
