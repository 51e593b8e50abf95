//! The command from the outside: a run that is killed goes on, bad input is one line and exit code 2.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const CONFIG: &str = r#"
    hidden_size = 32
    pattern = ["gated_delta_net", "attention"]
    [mixers.gated_delta_net]
    num_heads = 2
    head_dim = 16
    [mixers.attention]
    num_heads = 2
    [channel_mixer]
    intermediate_size = 48
"#;

fn thalweg(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_thalweg"));
    command.current_dir(folder).args(arguments);
    command
}

fn output(folder: &Path, arguments: &[&str]) -> Output {
    thalweg(folder, arguments).output().unwrap()
}

/// A folder with a text and a configuration.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let text: String = (0..400).map(|i| format!("line {i} of the water's way.\n")).collect();
    std::fs::write(folder.path().join("text.txt"), text).unwrap();
    std::fs::write(folder.path().join("small.toml"), CONFIG).unwrap();
    std::fs::write(folder.path().join("empty.txt"), "").unwrap();
    folder
}

const TRAIN: [&str; 17] = [
    "train",
    "--text",
    "text.txt",
    "--config",
    "small.toml",
    "--steps",
    "40",
    "--batch",
    "2",
    "--context",
    "32",
    "--save-every",
    "4",
    "--eval-every",
    "0",
    "--lr",
    "0.01",
];

fn train(folder: &Path, more: &[&str]) -> Output {
    output(folder, &[&TRAIN[..], more].concat())
}

/// [`TRAIN`] with another number of steps.
fn steps(steps: &str) -> [&str; 17] {
    TRAIN.map(|argument| if argument == "40" { steps } else { argument })
}

/// Step and loss of every line, as they are written.
fn losses(run: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let steps = text.lines().filter(|line| line.contains("\"lr\""));
    steps.map(|line| line.split(",\"accuracy\"").next().unwrap().to_owned()).collect()
}

#[test]
fn a_killed_run_goes_on_with_the_same_losses_and_generates() {
    let folder = folder();
    let path = folder.path();
    let whole = train(path, &["--out", "whole"]);
    assert!(whole.status.success(), "{}", String::from_utf8_lossy(&whole.stderr));

    let arguments = [&TRAIN[..], &["--out", "killed"]].concat();
    let mut child = thalweg(path, &arguments).stdout(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while !path.join("killed/step-00000008").exists() && start.elapsed() < Duration::from_secs(120) {
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let resumed = output(path, &["train", "--resume", "--out", "killed"]);
    assert!(resumed.status.success(), "{}", String::from_utf8_lossy(&resumed.stderr));
    assert_eq!(losses(&path.join("killed")), losses(&path.join("whole")));
    assert_eq!(losses(&path.join("whole")).len(), 40);
    assert!(path.join("killed/loss.svg").exists());

    let generate = ["generate", "--checkpoint", "whole", "--prompt", "line 1", "--max-tokens", "20", "--stats"];
    let (first, second) = (output(path, &generate), output(path, &generate));
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    assert!(first.stdout.starts_with(b"line 1") && first.stdout.len() > 12);
    assert_eq!(first.stdout, second.stdout);
    assert!(String::from_utf8_lossy(&first.stderr).contains("tokens/s"));

    // Nothing that exists is overwritten, and what is broken is told.
    let weights = path.join("whole/step-00000040/model.safetensors");
    let saved = std::fs::read(&weights).unwrap();
    refused(&train(path, &["--out", "whole"]), "out: ");
    refused(&output(path, &["train", "--resume", "--out", "whole", "--lr", "1"]), "lr: ");
    refused(&output(path, &["generate", "--checkpoint", "whole", "--prompt", ""]), "prompt: is empty");
    refused(&output(path, &["generate", "--checkpoint", "whole", "--prompt", "wXy"]), "prompt: byte 0x58");
    refused(&output(path, &["generate", "--checkpoint", "whole", "--prompt", "w", "--top-p", "2"]), "top-p: ");
    assert_eq!(std::fs::read(&weights).unwrap(), saved);
    std::fs::write(&weights, &saved[..saved.len() / 2]).unwrap();
    refused(&output(path, &["generate", "--checkpoint", "whole", "--prompt", "w"]), "is truncated");
    refused(&output(path, &["train", "--resume", "--out", "whole", "--steps", "50"]), "is truncated");
    assert!(!path.join("whole/step-00000050").exists());
}

/// A limit on the size of files stands for a disk that is full: weights do not fit, all else does.
#[cfg(unix)]
#[test]
fn a_save_that_fails_leaves_nothing_and_loses_nothing() {
    let folder = folder();
    let path = folder.path();
    let first = output(path, &[&steps("4")[..], &["--out", "run"]].concat());
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));

    let script = "trap '' XFSZ; ulimit -f 40; exec \"$0\" \"$@\"";
    let program = env!("CARGO_BIN_EXE_thalweg");
    let resume = ["train", "--resume", "--out", "run", "--steps", "8"];
    let arguments = [&["-c", script, program][..], &resume].concat();
    let mut full = Command::new("sh");
    // Software drivers of GPUs keep their memory in files, to which the limit applies too.
    full.env("VK_DRIVER_FILES", "/nonexistent").env("VK_ICD_FILENAMES", "/nonexistent");
    let full = full.current_dir(path).args(arguments).output().unwrap();
    refused(&full, "model.safetensors: ");
    let mut left: Vec<_> = std::fs::read_dir(path.join("run"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, [".lock", "loss.svg", "metrics.jsonl", "step-00000004"]);

    let resumed = output(path, &resume);
    assert!(resumed.status.success(), "{}", String::from_utf8_lossy(&resumed.stderr));
    assert_eq!(losses(&path.join("run")).len(), 8);
    let text = String::from_utf8_lossy(&resumed.stdout);
    assert!(text.contains("from step 4 on; learning rate 1.00e-3, 1.00e-3 at step 8"), "{text}");
}

#[test]
fn two_runs_in_one_folder_are_refused_until_the_first_is_gone() {
    let folder = folder();
    let path = folder.path();
    let mut child =
        thalweg(path, &[&steps("1000000")[..], &["--out", "run"]].concat()).stdout(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while !path.join("run/step-00000004").exists() && start.elapsed() < Duration::from_secs(120) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let (second, resumed) = (train(path, &["--out", "run"]), output(path, &["train", "--resume", "--out", "run"]));
    child.kill().unwrap();
    child.wait().unwrap();
    refused(&second, "run is in use by another run");
    refused(&resumed, "run is in use by another run");
    let done = losses(&path.join("run")).len().to_string();
    let resumed = output(path, &["train", "--resume", "--out", "run", "--steps", &done, "--eval-tokens", "40"]);
    assert!(resumed.status.success(), "{}", String::from_utf8_lossy(&resumed.stderr));
    let text = String::from_utf8_lossy(&resumed.stdout);
    assert!(text.contains("held-out text (part): "), "{text}");
}

fn refused(output: &Output, message: &str) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains(message) && error.trim_end().lines().count() == 1, "{message}: {error}");
}

#[test]
fn bad_input_is_one_line_and_exit_code_2() {
    let folder = folder();
    for (arguments, message) in [
        (&["train", "--text", "none.txt"][..], "text: "),
        (&["train", "--text", "empty.txt"], "text: "),
        (&["train"], "text: not given"),
        (&["train", "--text", "text.txt", "--preset", "gla-4:1-tiny"], "near names: gla-"),
        (&["train", "--text", "text.txt", "--config", "text.txt"], "config: "),
        (&["train", "--text", "text.txt", "--tokenizer", "small.toml"], "tokenizer: "),
        (&["train", "--text", "text.txt", "--context", "0"], "context: "),
        (&["train", "--text", "text.txt", "--context", "100000"], "text: its training part"),
        (&["train", "--text", "text.txt", "--device", "abacus"], "device: "),
        (&["train", "--text", "text.txt", "--steps", "few"], "--steps"),
        (&["train", "--task", "mqar", "--context", "16", "--task-items", "9"], "task-items: "),
        (&["train", "--task", "chess"], "--task"),
        (&["train", "--task", "mqar", "--task-items", "18446744073709551615"], "task-items: "),
        (&["train", "--lr", "0"], "lr: must be above 0"),
        (&["train", "--lr", "nan"], "lr: "),
        (&["train", "--lr=-1"], "lr: must be above 0"),
        (&["train", "--lr", "1e-60"], "lr: "),
        (&["train", "--weight-decay=-0.1"], "weight-decay: "),
        (&["train", "--weight-decay", "nan"], "weight-decay: "),
        (&["train", "--clip=-1"], "clip: "),
        (&["train", "--batch", "0"], "batch: "),
        (&["train", "--batch", "18446744073709551615"], "batch: "),
        (&["train", "--accumulate", "0"], "accumulate: "),
        (&["train", "--steps", "0"], "steps: "),
        (&["train", "--steps", "10", "--warmup", "11"], "warmup: is 11, the run has 10 steps"),
        (&["train", "--steps", "10", "--warmup", "100"], "warmup: is 100, the run has 10 steps"),
        (&["train", "--seed", "18446744073709551615"], "seed: "),
        (&["train", "--resume"], "resume: "),
        (&["train", "--resume", "--out", "none"], "checkpoint none: does not exist"),
        (&["generate", "--checkpoint", "none", "--prompt", "x"], "checkpoint none: does not exist"),
        (&["generate", "--prompt", "x"], "--checkpoint"),
        // Numbers out of range are told as such, with or without a sign.
        (&["train", "--text", "text.txt", "--lr", "-1"], "lr: must be above 0 and finite in f32, got -1"),
        (&["train", "--text", "text.txt", "--lr", "-inf"], "lr: must be above 0 and finite in f32, got -inf"),
        (
            &["train", "--text", "text.txt", "--weight-decay", "-0.5"],
            "weight-decay: must be 0 or more and finite in f32, got -0.5",
        ),
        (&["train", "--text", "text.txt", "--clip", "-1e3"], "clip: must be 0 or more and finite in f32, got -1000"),
        (
            &["train", "--text", "text.txt", "--steps", "-1"],
            "'-1' for '--steps <STEPS>': expected a whole number from 0",
        ),
        (&["train", "--text", "text.txt", "--seed", "-3"], "'-3' for '--seed <SEED>': expected a whole number from 0"),
        (&["train", "--task", "mqar", "--task-items", "-2"], "'-2' for '--task-items <TASK_ITEMS>': expected a whole"),
        (
            &["generate", "--checkpoint", "none", "--prompt", "x", "--temperature", "-1"],
            "temperature: must be 0 or more",
        ),
        (
            &["generate", "--checkpoint", "none", "--prompt", "x", "--temperature", "nan"],
            "temperature: must be 0 or more",
        ),
        (&["generate", "--checkpoint", "none", "--prompt", "x", "--top-p", "-0.1"], "top-p: must be above 0"),
        (
            &["generate", "--checkpoint", "none", "--prompt", "x", "--top-k", "-1"],
            "'-1' for '--top-k <TOP_K>': expected",
        ),
        (
            &["generate", "--checkpoint", "none", "--prompt", "x", "--max-tokens", "-1"],
            "--max-tokens <MAX_TOKENS>': expec",
        ),
        (&["generate", "--checkpoint", "none", "--prompt", "-x"], "checkpoint none: does not exist"),
        (&["conform", ".", "--tolerance", "-1"], "'-1' for '--tolerance <TOLERANCE>': expected a number"),
        (&["bench", "--time", "-5,3"], "'-5' for '--time <TIME>': expected a whole number from 0"),
        (&["bench", "--threads", "-1"], "'-1' for '--threads <THREADS>': expected a whole number from 0"),
    ] {
        let output = output(folder.path(), arguments);
        refused(&output, message);
    }
    assert!(!folder.path().join("runs").exists(), "nothing was made");
}

#[test]
fn a_task_reports_its_accuracy() {
    let folder = folder();
    let arguments =
        ["train", "--task", "parity", "--config", "small.toml", "--context", "8", "--steps", "3", "--batch", "4"];
    let run = output(folder.path(), &arguments);
    let text = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success() && text.contains("held-out examples: "), "{text}");
    let run = folder.path().join("runs/parity-small");
    assert!(run.join("step-00000003/manifest.json").exists());
    let generate = output(&run, &["generate", "--checkpoint", ".", "--prompt", "1"]);
    refused(&generate, "synthetic task");
}

/// Pieces that all begin with a space, as Llama's words do, and blocks that belong to another use of the file.
const TOKENIZER: &str = r#"{
    "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
    "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
    "padding": {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "?"},
    "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": true},
    "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": true},
    "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false, "vocab": [["\u2581?", 0.0], ["[end]", -9.0],
              ["\u2581the", -1.0], ["\u2581cat", -1.0], ["\u2581sat", -1.0]]}
}"#;

#[test]
fn a_hugging_face_tokenizer_reads_all_of_the_text_and_goes_on_after_the_prompt() {
    let folder = folder();
    let path = folder.path();
    std::fs::create_dir(path.join("texts")).unwrap();
    std::fs::write(path.join("texts/a.txt"), "the cat sat ".repeat(100).trim_end()).unwrap();
    std::fs::write(path.join("texts/b.txt"), "cat the sat ".repeat(100).trim_end()).unwrap();
    std::fs::write(path.join("tokenizer.json"), TOKENIZER).unwrap();
    std::fs::write(path.join("tokenizer_config.json"), r#"{"eos_token": {"content": "[end]"}}"#).unwrap();
    let arguments = [
        "train",
        "--text",
        "texts",
        "--tokenizer",
        "tokenizer.json",
        "--config",
        "small.toml",
        "--steps",
        "2",
        "--batch",
        "2",
        "--context",
        "8",
        "--out",
        "run",
    ];
    let run = output(path, &arguments);
    let (out, error) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{error}");
    // 600 words, a separator before each of two documents and of what is held out, and a space at the cut.
    assert!(out.contains("543 tokens to train on, 61 held out"), "{out}");
    assert_eq!(error.matches("truncation to 8 tokens is switched off").count(), 1, "{error}");
    assert_eq!(error.matches("padding is switched off").count(), 1, "{error}");
    let kept = std::fs::read_to_string(path.join("run/step-00000002/tokenizer_config.json")).unwrap();
    assert_eq!(kept, r#"{"eos_token":"[end]"}"#);

    let generate = ["generate", "--checkpoint", "run", "--max-tokens", "40", "--temperature", "2", "--prompt"];
    let run = output(path, &[&generate[..], &["the cat"]].concat());
    let out = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success() && run.stderr.is_empty(), "{}", String::from_utf8_lossy(&run.stderr));
    assert!(out.starts_with("the cat") && out.trim_end().len() > 7, "{out}");
    assert!(out.trim_end().split(' ').all(|word| ["the", "cat", "sat", "?", ""].contains(&word)), "{out}");
    refused(&output(path, &[&generate[..], &["the dog"]].concat()), "prompt: token 1 is outside the vocabulary");
}
