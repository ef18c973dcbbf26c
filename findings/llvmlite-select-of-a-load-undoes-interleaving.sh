#!/usr/bin/env bash
# llvmlite 0.50.0 (LLVM 22.1), its default pipeline at level 3, for x86-64-v4 with AVX-512 VNNI.
#
# A loop adds up eight rows of integer dot products (vpdpbusd), written row by row in turns, so that
# no product waits for the one before it, and then a float sum of each row. One expects that it makes
# no difference to the products whether these sums are kept in registers over the loop (phi) or in
# memory, where the first turn takes zero: select(first turn, zero, load).
#
# Seen: with phi the products stay in turns. With the select LLVM makes a branch of each select, so as
# to save the load. Where the pointers are "noalias" that is all; where they are not, it also moves a
# row's whole chain of products behind its branch, to where the sum is used, so that 58 of 63
# neighbouring products add to the same register and wait for each other. The loads of the other
# operands cannot follow, as a store of a sum may change what they read: their broadcast values are
# made before the first branch, and 85 vectors go through the stack. No optimisation remark tells.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q llvmlite==0.50.0 2>"$work/pip.log" || { cat "$work/pip.log"; exit 1; }
cat >"$work/try.py" <<'PY'
import re
import sys

import llvmlite.binding as llvm

ROWS, WORDS = 8, 8
DOT, FMA = "@llvm.x86.avx512.vpdpbusd.512", "@llvm.fma.v16f32"
INTS, FLOATS = "<16 x i32>", "<16 x float>"


def module(kept_in: str, pointer: str) -> str:
    """k: words of 16 codes; q: words of 8 rows; s: sums of 8 rows by 16."""
    lines = [
        f"declare {INTS} {DOT}({INTS}, {INTS}, {INTS})",
        f"declare {FLOATS} {FMA}({FLOATS}, {FLOATS}, {FLOATS})",
        f"define void @f({pointer} %k, {pointer} %q, {pointer} %s, i64 %turns) {{",
        "entry:", "br label %loop", "loop:", "%t = phi i64 [0, %entry], [%next, %loop]",
    ]
    if kept_in == "phi":
        lines += [f"%old{r} = phi {FLOATS} [zeroinitializer, %entry], [%new{r}, %loop]"
                  for r in range(ROWS)]
    lines += ["%next = add i64 %t, 1", "%more = icmp slt i64 %next, %turns",
              "%first = icmp eq i64 %t, 0",
              f"%kt = getelementptr [{WORDS} x {INTS}], ptr %k, i64 %t",
              f"%qt = getelementptr [{ROWS * WORDS} x i32], ptr %q, i64 %t"]
    for w in range(WORDS):
        lines += [f"%kp{w} = getelementptr {INTS}, ptr %kt, i64 {w}",
                  f"%k{w} = load {INTS}, ptr %kp{w}, align 4"]
        for r in range(ROWS):
            n, before = f"{r}_{w}", f"%d{r}_{w - 1}" if w else "zeroinitializer"
            lines += [
                f"%p{n} = getelementptr i32, ptr %qt, i64 {ROWS * w + r}",
                f"%q{n} = load i32, ptr %p{n}, align 4",
                f"%i{n} = insertelement {INTS} poison, i32 %q{n}, i32 0",
                f"%b{n} = shufflevector {INTS} %i{n}, {INTS} poison, {INTS} zeroinitializer",
                f"%d{n} = call {INTS} {DOT}({INTS} {before}, {INTS} %k{w}, {INTS} %b{n})",
            ]
    for r in range(ROWS):
        lines += [f"%f{r} = sitofp {INTS} %d{r}_{WORDS - 1} to {FLOATS}",
                  f"%sp{r} = getelementptr {FLOATS}, ptr %s, i64 {r}"]
        store = f"store {FLOATS} %new{r}, ptr %sp{r}, align 4"
        if kept_in == "memory":
            lines += [f"%l{r} = load {FLOATS}, ptr %sp{r}, align 4",
                      f"%old{r} = select i1 %first, {FLOATS} zeroinitializer, {FLOATS} %l{r}"]
        lines.append(f"%new{r} = call {FLOATS} {FMA}({FLOATS} %f{r}, {FLOATS} %f{r}, "
                     f"{FLOATS} %old{r})")
        lines += [store] * (kept_in == "memory")
    lines += ["br i1 %more, label %loop, label %end", "end:"]
    if kept_in == "phi":
        lines += [f"store {FLOATS} %new{r}, ptr %sp{r}, align 4" for r in range(ROWS)]
    return "\n".join([*lines, "ret void", "}"])


def seen(kept_in: str, pointer: str) -> tuple[int, int, int]:
    """Branches, vectors on the stack, products that follow one to the same register."""
    code = llvm.parse_assembly(module(kept_in, pointer))
    code.triple = "x86_64-unknown-linux-gnu"
    machine = llvm.Target.from_triple(code.triple).create_target_machine(
        "x86-64-v4", "+avx512vnni,-prefer-256-bit", opt=3
    )
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(code, builder)
    lines = machine.emit_assembly(code).splitlines()
    targets = re.findall(r"vpdpbusd.*(%zmm\d+)\n", "\n".join(lines) + "\n")
    assert len(targets) == ROWS * WORDS
    branches = sum(line.strip().startswith("j") for line in lines)
    spills = sum("zmm" in line and "(%rsp)" in line for line in lines)
    return branches, spills, sum(a == b for a, b in zip(targets, targets[1:]))


llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
found = {(kept, p): seen(kept, p) for kept in ("phi", "memory") for p in ("ptr noalias", "ptr")}
for (kept, pointer), (branches, spills, chained) in found.items():
    print(f"sums in {kept}, {pointer}: {branches} branches, {spills} vectors on the stack, "
          f"{chained} of 63 neighbouring products to one register")
in_turns = all(row == (1, 0, 0) for (kept, _), row in found.items() if kept == "phi")
apart, alike = found["memory", "ptr noalias"], found["memory", "ptr"]
moved = alike[0] > 8 and alike[1] > 40 and alike[2] > 40
sys.exit(not (in_turns and apart[0] > 8 and apart[1:] == (0, 0) and moved))
PY
"$work/venv/bin/python" "$work/try.py"
