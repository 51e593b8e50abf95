//! The instructions that kernels have in PTX, as calls of the emulator's.

/// A statement `asm ("text" : "=r"(out), ... : "r"(in), ... );`
struct Statement<'a> {
    text: &'a str,
    outputs: Vec<&'a str>,
    inputs: Vec<&'a str>,
}

/// `source` with a call in the place of each `asm` statement.
pub(super) fn replace(source: &str) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = source;
    while let Some(start) = rest.find("asm ") {
        let (before, after) = rest.split_at(start);
        let end = after.find(");").ok_or("a statement of PTX without an end")?;
        out.push_str(before);
        out.push_str(&call(&Statement::parse(&after[..end])?)?);
        rest = &after[end + 2..];
    }
    out.push_str(rest);
    Ok(out)
}

impl<'a> Statement<'a> {
    fn parse(statement: &'a str) -> Result<Self, String> {
        let odd = || format!("PTX in a form that is not known: {statement}");
        let (_, quoted) = statement.split_once("(\"").ok_or_else(odd)?;
        let (text, operands) = quoted.split_once("\" :").ok_or_else(odd)?;
        let mut lists = operands.splitn(3, ':').map(expressions);
        Ok(Self { text, outputs: lists.next().ok_or_else(odd)?, inputs: lists.next().unwrap_or_default() })
    }
}

/// The expressions of `"r"(x), "f"(y)`. They are names and have no brackets.
fn expressions(list: &str) -> Vec<&str> {
    let operands = list.split("),").filter_map(|operand| operand.split_once('('));
    operands.map(|(_, expression)| expression.trim_end().trim_end_matches(')')).collect()
}

fn call(statement: &Statement) -> Result<String, String> {
    let Statement { text, outputs, inputs } = statement;
    let words: Vec<&str> = text.split([' ', '.']).collect();
    let call = match words.first() {
        Some(&"ldmatrix") => {
            let (n, transposed) = (outputs.len(), words.contains(&"trans"));
            format!("uint32_t out[{n}]; emulator::ptx::ldmatrix<{n}, {transposed}>(out, {});", inputs.join(", "))
        }
        Some(&"stmatrix") if !words.contains(&"trans") => {
            let (address, values) = inputs.split_first().ok_or_else(|| format!("too few operands: {text}"))?;
            let n = values.len();
            format!("const uint32_t in[] = {{{}}}; emulator::ptx::stmatrix<{n}>({address}, in);", values.join(", "))
        }
        Some(&"mma") => {
            let (element, k) = match text {
                _ if text.contains("m16n8k16.row.col.f32.bf16.bf16.f32") => ("__nv_bfloat16", 16),
                _ if text.contains("m16n8k16.row.col.f32.f16.f16.f32") => ("__half", 16),
                _ if text.contains("m16n8k8.row.col.f32.tf32.tf32.f32") => ("float", 8),
                _ => return Err(format!("a product that is not known: {text}")),
            };
            let [a, b, c] =
                [0..4, 4..6, 6..10].map(|range| inputs.get(range).map(|list| list.join("), bits_of<uint32_t>(")));
            let (Some(a), Some(b), Some(c)) = (a, b, c) else { return Err(format!("too few operands: {text}")) };
            format!(
                "const uint32_t a[] = {{bits_of<uint32_t>({a})}}, b[] = {{bits_of<uint32_t>({b})}}, c[] = {{bits_of<uint32_t>({c})}}; \
                 float out[4]; emulator::ptx::mma<{element}, {k}>(out, a, b, reinterpret_cast<const float*>(c));"
            )
        }
        _ => return Err(format!("an instruction that is not known: {text}")),
    };
    let results: String = outputs.iter().enumerate().map(|(i, name)| format!(" {name} = out[{i}];")).collect();
    Ok(format!("{{ {call}{results} }}"))
}
