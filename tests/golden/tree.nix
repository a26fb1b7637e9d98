# One store path for each shape that a NAR, a narinfo or a listing can have. Nothing from outside: builders use the
# host's /bin/sh and coreutils, which the sandbox shows, so contents are the same on every machine.
let
  build = name: script: more: derivation ({
    inherit name;
    system = "x86_64-linux";
    builder = "/bin/sh";
    args = [ "-euc" script ];
    PATH = "/usr/bin:/bin";
  } // more);

  leaf = build "leaf" "echo leaf > $out" { };

  outputs = build "outputs" ''
    mkdir -p $out/bin $out/empty $out/share/nested/deeper $dev/include
    printf '#!/bin/sh\necho %s\n' $lib > $out/bin/tool
    chmod +x $out/bin/tool
    ln -s tool $out/bin/alias
    ln -s ${leaf} $out/leaf
    ln -s /nowhere/at/all $out/dangling
    : > $out/zero
    printf 1234567 > $out/seven
    printf 12345678 > $out/eight
    printf 'two words' > "$out/two words"
    printf umlaut > $out/$(printf '\303\274')
    printf 'before a directory of the same prefix' > $out/share.txt
    echo deep > $out/share/nested/deeper/file
    echo "$out" > $dev/include/out.h
    mkdir $lib
    printf 'library of %s' ${leaf} > $lib/lib.so
  '' { outputs = [ "out" "dev" "lib" ]; };
in
{
  inherit leaf outputs;
  executable-root = build "executable-root" ''printf '#!/bin/sh\n' > $out; chmod +x $out'' { };
  empty-root = build "empty-root" ": > $out" { };
  link-root = build "link-root" "ln -s ${leaf} $out" { };
  empty-directory = build "empty-directory" "mkdir $out" { };
  self-reference = build "self-reference" ''mkdir $out; echo $out > $out/me; echo ${outputs.dev} > $out/other'' { };
  bytes-name = build "bytes-name" ''mkdir $out; printf x > $out/$(printf 'bad\377name'); printf y > $out/good'' { };
  fixed-output = build "fixed-output.txt" "printf fixed > $out" {
    outputHashMode = "flat";
    outputHashAlgo = "sha256";
    outputHash = builtins.hashString "sha256" "fixed";
  };
  content-addressed = build "content-addressed" ''mkdir $out; echo ${leaf} > $out/leaf; echo $out > $out/me'' {
    __contentAddressed = true;
    outputHashMode = "recursive";
    outputHashAlgo = "sha256";
  };
  text = builtins.toFile "text.txt" "a text file";
}
