# A small store as real ones are: several outputs, references in all directions, every shape of file, and a program of
# the machine with its libraries. Built with nothing but /bin/sh, coreutils and the C library of the machine.
let
  build = name: script: more: derivation ({
    inherit name;
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-euc" script ];
    PATH = "/usr/bin:/bin";
    LC_ALL = "C";
  } // more);
in
rec {
  # A file as the root.
  note = build "note.txt" "echo 'a note' > $out" { };

  # An executable file as the root.
  hello = build "hello" ''printf '#!/bin/sh\necho hello from %s\n' $out > $out; chmod +x $out'' { };

  # A link as the root.
  pointer = build "pointer" "ln -s ${shapes}/bin $out" { };

  # Names and kinds.
  shapes = build "shapes-1.0" ''
    mkdir -p $out/bin $out/empty "$out/two words" $out/a $out/a.b $out/deep/er/than/most
    printf '#!/bin/sh\ncat %s\n' ${note} > $out/bin/tool
    chmod +x $out/bin/tool
    ln -s tool $out/bin/alias
    ln -s ${note} $out/note
    ln -s /nowhere/at/all $out/dangling
    ln -s ../two\ words "$out/two words/loop"
    : > $out/zero
    printf x > "$out/two words/a file"
    printf u > $out/$(printf 'gr\303\274\303\237e')
    printf 'ordered by bytes' > $out/a-b
    printf 1 > $out/a/1
    printf 2 > $out/a.b/2
    echo bottom > $out/deep/er/than/most/file
    printf long > $out/$(printf 'n%.0s' $(seq 200))
  '' { };

  # A name that is not UTF-8: Nix cannot write a listing of it.
  bytes-name = build "bytes-name" ''mkdir $out; printf x > $out/$(printf 'bad\377name'); printf y > $out/good'' { };

  # 3 MiB that do not compress.
  big = build "big" ''mkdir $out; seq 1 2000000 | gzip -n | head -c 3145728 > $out/data; cp $out/data $out/again'' { };

  # Many small files.
  many = build "many" ''
    for d in $(seq 20); do
      mkdir -p $out/$d
      for f in $(seq 25); do echo "$d $f" > $out/$d/$f.txt; done
    done
  '' { };

  # Refers to itself.
  selfish = build "selfish" ''mkdir $out; echo $out > $out/me; echo ${many} > $out/other'' { };

  # Several outputs; dev refers to out, out to doc.
  several = build "several-2.1" ''
    mkdir -p $out/lib $dev/include $doc
    echo 'read me' > $doc/README
    echo $doc > $out/lib/where
    echo "$out/lib" > $dev/include/path.h
  '' { outputs = [ "out" "dev" "doc" ]; };

  # The machine's bash, its libraries and its loader; `bash/bin/bash` starts it with no file of the machine's.
  libraries = build "libraries" ''
    mkdir -p $out/lib
    cp -L $(ldd /bin/bash | grep -o '/[^ )]*') $out/lib/
    chmod +x $out/lib/ld-linux*
  '' { };
  bash = build "bash" ''
    mkdir -p $out/bin $out/libexec
    cp -L /bin/bash $out/libexec/bash
    loader=$(echo ${libraries}/lib/ld-linux*)
    printf '#!/bin/sh\nexec %s --library-path %s/lib %s "$@"\n' $loader ${libraries} $out/libexec/bash > $out/bin/bash
    chmod +x $out/bin/bash
  '' { };

  # A script that runs on it.
  greet = build "greet" ''
    mkdir -p $out/bin
    printf '#!%s\necho "bash $BASH_VERSINFO greets"\nread -r line < %s\necho "$line"\n' ${bash}/libexec/bash ${note} > $out/bin/greet
    chmod +x $out/bin/greet
  '' { };

  # One path that refers to all others.
  everything = build "everything" ''
    mkdir $out
    for path in ${note} ${hello} ${pointer} ${shapes} ${big} ${selfish} ${several} ${several.dev} ${greet}; do
      ln -s $path $out/
    done
  '' { };
}
