package tomlfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"keybroker/internal/need"
)

const sample = `# a comment
"quoted.key" = "[not a table]"
text = """
[also]
not = "tables" """
list = [ # comment with ] and "
  1, 2,
]

[vm]
boot_window = "5m"
luks.cipher = 'a # b'
[[service]]
name = "a"
[service.inner]
x = 1
[[service]]

name = "b"
inner = { x = 2, y = [ { z = 3 } ] }
`

func TestLines(t *testing.T) {
	root, err := Parse("f.toml", []byte(sample))
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]int{"quoted.key": 2, "text": 3, "list": 6, "vm": 10} {
		if got := root.KeyLine(key); got != want {
			t.Errorf("line of %s = %d, want %d", key, got, want)
		}
	}
	vm := root.Table("vm")
	if vm.Line() != 10 || vm.KeyLine("boot_window") != 11 || vm.Table("luks").KeyLine("cipher") != 12 {
		t.Errorf("lines of [vm]: %d, %d, %d", vm.Line(), vm.KeyLine("boot_window"), vm.Table("luks").KeyLine("cipher"))
	}
	services := root.Tables("service")
	if len(services) != 2 || services[0].Line() != 13 || services[1].Line() != 17 {
		t.Fatalf("services: %v", services)
	}
	if got := services[0].Table("inner").KeyLine("x"); got != 16 {
		t.Errorf("line of x in the first service's inner = %d, want 16", got)
	}
	if got := services[1].Table("inner").Tables("y")[0].KeyLine("z"); got != 20 {
		t.Errorf("line of an inline z = %d, want that of its statement, 20", got)
	}
}

// Each wrong file, and what its error says.
func TestErrors(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"\nword = 3", `f.toml:2: "word": expected a string, got a whole number`},
		{"\n\nlist = 'a'", `f.toml:3: "list": expected a list of strings in [ ], got a string of 1 characters`},
		{"list = ['a', 1]", `f.toml:1: "list": expected a list of strings, got a whole number at place 2`},
		{"uids = [1, -1]", `f.toml:1: "uids": expected a list of whole numbers from 0 to 4294967294, got a whole number at place 2`},
		{"uids = [4294967295]", `whole numbers from 0 to 4294967294`},
		{"flag = 'yes'", `f.toml:1: "flag": expected true or false, got a string of 3 characters`},
		{"count = 11", `f.toml:1: "count": expected a whole number from 1 to 10, got one outside`},
		{"time = '5'", `f.toml:1: "time": expected a time from "1s" to "1h0m0s", got a string of 1 characters`},
		{"size = '1MB'", `f.toml:1: "size": expected a size from "1KiB" to "1GiB", got a string of 3 characters`},
		{"size = '999999999999GiB'", `expected a size from`},
		{"choice = 'c'", `f.toml:1: "choice": expected one of "a", "b", got a string of 1 characters`},
		{"sub = 1", `f.toml:1: "sub": expected a table [sub], got a whole number`},
		{"[sub]\nx = ''", `f.toml:2: "x" in [sub]: expected true or false, got an empty string`},
		{"many = 1", `f.toml:1: "many": expected tables [[many]], got a whole number`},
		{"many = [1]", `f.toml:1: "many": expected tables [[many]], got a list`},
		{"[[many]]\n[[many]]\ny = 1", `f.toml:3: unknown key "y" in [[many]]; known here: x`},
		{"\nwrod = ''", `f.toml:2: unknown key "wrod"; did you mean "word"`},
		{"Word = ''", `f.toml:1: unknown key "Word"; did you mean "word"`},
		{"a = 1\na = 2", `f.toml:2: expected TOML: Key 'a' has already been defined.`},
		{"a = \n", `f.toml:1: expected TOML:`},
		{"a = '\xff'", `f.toml:1: expected TOML: invalid UTF-8`},
	} {
		_, err := readAll(c.text)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("reading %q:\n got %v\nwant %s", c.text, err, c.want)
		}
		var e *Error
		if !errors.As(err, &e) || e.Line < 1 || e.File != "f.toml" {
			t.Errorf("reading %q: %v is not an *Error with a line", c.text, err)
		}
	}
}

// all is what readAll reads.
type all struct {
	word, choice string
	list         []string
	uids         []uint32
	flag, x      bool
	count        int
	time         time.Duration
	size         int64
	many         int
}

func readAll(text string) (a all, err error) {
	root, err := Parse("f.toml", []byte(text))
	if err != nil {
		return a, err
	}
	root.String("word", &a.word)
	root.Choice("choice", &a.choice, "a", "b")
	root.Strings("list", &a.list)
	root.Uint32s("uids", &a.uids)
	root.Bool("flag", &a.flag)
	root.Int("count", &a.count, 1, 10)
	root.Duration("time", &a.time, time.Second, time.Hour)
	root.Size("size", &a.size, 1<<10, 1<<30)
	if sub := root.Table("sub"); sub != nil {
		sub.Bool("x", &a.x)
	}
	for _, m := range root.Tables("many") {
		m.Bool("x", &a.x)
		a.many++
	}
	return a, root.Err()
}

func TestValues(t *testing.T) {
	a, err := readAll("word='w'\nchoice='b'\nlist=[]\nuids=[0,7]\nflag=true\ncount=10\ntime='90s'\nsize='3MiB'\nmany=[{},{x=true}]")
	if err != nil {
		t.Fatal(err)
	}
	if a.list == nil {
		t.Error("an empty list became nil, which means not given")
	}
	got := fmt.Sprintf("%+v", a)
	want := "{word:w choice:b list:[] uids:[0 7] flag:true x:true count:10 time:90000000000 size:3145728 many:2}"
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestAllErrorsAtOnce(t *testing.T) {
	_, err := readAll("word = 1\nother = 2\nflag = 3\n" + strings.Repeat("[[many]]\ny = 1\n", 40))
	lines := strings.Split(err.Error(), "\n")
	if len(lines) != maxErrors+1 || !strings.HasPrefix(lines[0], "f.toml:1:") || !strings.HasPrefix(lines[1], "f.toml:2:") {
		t.Errorf("got %d lines:\n%v", len(lines), err)
	}
	if last := lines[len(lines)-1]; last != "f.toml: and 23 more errors" {
		t.Errorf("last line %q", last)
	}
}

// Nothing of a value is in an error, wherever a secret was put by mistake.
func TestErrorsHoldNoSecret(t *testing.T) {
	const secret = "c0ffee11c0ffee22c0ffee33"
	for _, text := range []string{
		"word = " + secret, "word = '" + secret, "word = \"" + secret + "\n", "word = [" + secret + "]", "choice = '" + secret + "'",
		"time = '" + secret + "'", "size = '" + secret + "'", "flag = '" + secret + "'", "list = '" + secret + "'", secret, secret + " = 1",
		"[" + secret + "]", "word = 0x" + secret, "word = 11" + secret, "uids = ['" + secret + "']", "'" + secret + " !' = 1",
		"word = 1." + secret, "word = 99999999999999999999999", "word = 1979-05-27T" + secret, "a = 1\n[a." + secret + "]\nb = 2",
		secret + "=1\n" + secret + "=2", "a.\"" + secret + "\"=1\n a.\"" + secret + "\"=1",
	} {
		_, err := readAll(text)
		if err == nil {
			t.Errorf("reading %q: no error", text)
		} else if strings.Contains(err.Error(), secret[:12]) && !strings.HasPrefix(text, secret) && !strings.HasPrefix(text, "[") {
			t.Errorf("reading %q: the error repeats it: %v", text, err)
		} else if strings.Contains(err.Error(), "9999999999") {
			t.Errorf("reading %q: the error repeats it: %v", text, err)
		}
	}
}

func TestRead(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.toml")
	write := func(mode fs.FileMode, size int) {
		t.Helper()
		if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	write(0o644, 10)
	if data, err := Read(path); err != nil || len(data) != 10 {
		t.Errorf("mode 0644: %d octets, %v", len(data), err)
	}
	for _, mode := range []fs.FileMode{0o664, 0o646} {
		write(mode, 10)
		if _, err := Read(path); !errors.Is(err, ErrUnsafe) || !strings.Contains(err.Error(), "run: chmod go-w "+path) {
			t.Errorf("mode %o: %v", mode, err)
		}
	}
	write(0o600, MaxSize+1)
	if _, err := Read(path); err == nil || !strings.Contains(err.Error(), "at most 1048576 octets") {
		t.Errorf("too long: %v", err)
	}
	if _, err := Read(dir); err == nil || !strings.Contains(err.Error(), "expected a regular file") {
		t.Errorf("a folder: %v", err)
	}
	if _, err := Read(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}

func TestReadForeignOwner(t *testing.T) {
	need.Root(t)
	path := filepath.Join(t.TempDir(), "a.toml")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chown(path, 1001, 0)); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(path); !errors.Is(err, ErrUnsafe) || !strings.Contains(err.Error(), "got uid 1001; run: chown root "+path) {
		t.Errorf("owner 1001: %v", err)
	}
}

func TestList(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "policy.d")
	if paths, err := List(dir, 3); err != nil || paths != nil {
		t.Errorf("missing folder: %v, %v", paths, err)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"20-b.toml", "10-a.toml", ".hidden.toml", "30-c.toml~", "README"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	paths, err := List(dir, 2)
	if err != nil || len(paths) != 2 || filepath.Base(paths[0]) != "10-a.toml" || filepath.Base(paths[1]) != "20-b.toml" {
		t.Errorf("got %v, %v", paths, err)
	}
	if _, err := List(dir, 1); err == nil || !strings.Contains(err.Error(), "at most 1 files, got 2") {
		t.Errorf("too many: %v", err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := List(dir, 2); !errors.Is(err, ErrUnsafe) {
		t.Errorf("folder that everybody writes: %v", err)
	}
}

// Whatever the decoder takes, every statement's key is found on the line that it stands on, the walk ends, and no key has more
// parts than Parse takes.
func FuzzLines(f *testing.F) {
	f.Add([]byte(sample))
	f.Add([]byte("\ufeffa = 1\r\nb.'c d' = \"\"\"x\\\n\"\"\"\"\"\n[[q]]\n[q.r]\ns=[[1,2],{a='''\n'''}]"))
	for _, form := range []string{"%s = 1", "[%s]", "[[%s]]\nb = 1", "a = { b = { %s = 1 } }", "a = [ # '\n{ %s = \"\"\"\n\"\"\" }]"} {
		f.Add(fmt.Appendf(nil, form, dotted(16)))
		f.Add(fmt.Appendf(nil, form, dotted(400)))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		root, err := Parse("f.toml", data)
		if err != nil {
			if root != nil {
				t.Fatal("a table beside an error")
			}
			return
		}
		checkParts(t, string(data))
		lines := strings.Split(string(data), "\n")
		checkLines(t, root, lines)
	})
}

func checkLines(t *testing.T, table *Table, lines []string) {
	for key, v := range table.values {
		if table.lines != nil && table.lines.children[key] == nil && !isInline(table) {
			t.Fatalf("key %q of %q has no line", key, table.path)
		}
		line := table.KeyLine(key)
		if line < 1 || line > len(lines) {
			t.Fatalf("key %q is on line %d of %d", key, line, len(lines))
		}
		if shown(key) != "(not a name)" && table.lines != nil && !strings.Contains(lines[line-1], key) {
			if !strings.Contains(lines[line-1], `\`) { // an escaped key
				t.Fatalf("key %q is not on line %d: %q", key, line, lines[line-1])
			}
		}
		if _, ok := v.(map[string]any); ok {
			checkLines(t, table.Table(key), lines)
		} else if _, ok := v.([]map[string]any); ok {
			for _, sub := range table.Tables(key) {
				checkLines(t, sub, lines)
			}
		}
	}
}

// isInline reports whether the table was written as { }, whose keys have the line of the table.
func isInline(t *Table) bool { return len(t.lines.children) == 0 }
