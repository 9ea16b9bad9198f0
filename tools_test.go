package keybroker_test

import (
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"keybroker/internal/need"
)

// command runs a program in a folder and returns what it says.
func command(t *testing.T, dir string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// sourceFolder is a folder with what `make install` needs, and stand-ins for the programs.
func sourceFolder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	root, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"Makefile", "deploy"} {
		if err := os.Symlink(filepath.Join(root, name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	const program = "#!/bin/sh\nif [ \"$1\" = man ]; then echo manual >\"$2/keybroker.1\"; else echo completion; fi\n"
	for _, name := range []string{"keybroker", "keybroker-agent"} {
		if err := os.WriteFile(filepath.Join(dir, "bin", name), []byte(program), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// filesBelow lists the files below a folder, with their modes.
func filesBelow(t *testing.T, dir string) map[string]fs.FileMode {
	t.Helper()
	found := map[string]fs.FileMode{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		found[strings.TrimPrefix(path, dir)] = info.Mode().Perm()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// Every program and file that an installed unit, the hook, doctor or the guide names is installed; uninstall leaves nothing; policy is never made.
func TestInstall(t *testing.T) {
	need.Program(t, "make")
	doctor, err := os.ReadFile("cmd/broker/doctor.go")
	if err != nil {
		t.Fatal(err)
	}
	guide, err := os.ReadFile("docs/libvirt.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, prefix := range []string{"/usr", "/opt/kb"} {
		source, dest := sourceFolder(t), t.TempDir()
		if out, err := command(t, source, "make", "install", "DESTDIR="+dest, "PREFIX="+prefix); err != nil {
			t.Fatalf("make install: %v\n%s", err, out)
		}
		found := filesBelow(t, dest)
		for path, mode := range map[string]fs.FileMode{
			prefix + "/bin/keybroker":                                  0o755,
			prefix + "/bin/keybroker-agent":                            0o755,
			prefix + "/lib/systemd/system/keybroker.service":           0o644,
			prefix + "/share/keybroker/libvirt-hook":                   0o755,
			prefix + "/share/keybroker/examples/policy.toml":           0o644,
			prefix + "/share/keybroker/guest/agent.toml":               0o644,
			prefix + "/share/keybroker/guest/keybroker-agent.service":  0o644,
			prefix + "/share/bash-completion/completions/keybroker":    0o644,
			"/etc/libvirt/hooks/qemu.d/keybroker":                      0o755,
			prefix + "/share/man/man1/keybroker.1":                     0o644,
			prefix + "/share/fish/vendor_completions.d/keybroker.fish": 0o644,
		} {
			if got, ok := found[path]; !ok || got&0o755 != mode&0o755 {
				t.Errorf("%s: mode %04o, expected %04o", path, got, mode)
			}
		}
		for path := range found {
			if strings.HasPrefix(path, "/etc/keybroker") {
				t.Errorf("%s is the administrator's", path)
			}
			checkNamedPaths(t, dest, path, prefix, found)
		}
		if prefix == "/usr" {
			checkNames(t, "doctor.go", string(doctor), prefix, found)
			checkNames(t, "docs/libvirt.md", string(guide), prefix, found)
		}
		if out, err := command(t, source, "make", "uninstall", "DESTDIR="+dest, "PREFIX="+prefix); err != nil {
			t.Fatalf("make uninstall: %v\n%s", err, out)
		}
		if left := filesBelow(t, dest); len(left) != 0 {
			t.Errorf("uninstall leaves %v", left)
		}
	}
}

// namedPath finds what of keybroker's a text names below a prefix.
var namedPath = regexp.MustCompile(`/(usr|opt/kb)/s?(bin|share)/[a-z/-]*keybroker[a-z./-]*[a-z]`)

func checkNamedPaths(t *testing.T, dest, path, prefix string, found map[string]fs.FileMode) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dest, path))
	if err != nil {
		t.Fatal(err)
	}
	checkNames(t, path, string(text), prefix, found)
}

func checkNames(t *testing.T, in, text, prefix string, found map[string]fs.FileMode) {
	t.Helper()
	for _, named := range namedPath.FindAllString(text, -1) {
		installed := func(path string) bool { return path == named || strings.HasPrefix(path, named+"/") }
		if !slices.ContainsFunc(slices.Collect(maps.Keys(found)), installed) || !strings.HasPrefix(named, prefix+"/") {
			t.Errorf("%s names %s, which is not installed", in, named)
		}
	}
}

// One line for each fuzz target, with how often it ran; nothing that does not build is passed over.
func TestFuzzScript(t *testing.T) {
	need.Program(t, "bash")
	if testing.Short() {
		t.Skip("-short: fuzzing builds a package anew")
	}
	script, err := os.ReadFile("internal/tools/fuzz.sh")
	if err != nil || !strings.Contains(string(script), "PACKAGE") { // else it would fuzz the whole module
		t.Fatalf("fuzz.sh takes no packages, %v", err)
	}
	out, err := command(t, ".", "internal/tools/fuzz.sh", "1s", "./internal/tuple")
	if lines := slices.Collect(strings.Lines(out)); err != nil || len(lines) != 1 || !fuzzLine.MatchString(lines[0]) {
		t.Errorf("%v: %q", err, out)
	}
	if out, err := command(t, ".", "internal/tools/fuzz.sh", "1x", "./nowhere"); err == nil {
		t.Errorf("a package that is not there: %q", out)
	}
}

// fuzzLine is what fuzz.sh says of a target.
var fuzzLine = regexp.MustCompile(`^fuzz +keybroker/internal/tuple +FuzzEncode +execs: [0-9]+\n$`)

// Where systemd is this host's own, uninstall stops and disables every unit before its file goes.
func TestUninstallStopsTheBroker(t *testing.T) {
	units, err := os.ReadDir("deploy/systemd")
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("make", "--no-print-directory", "-n", "uninstall", "DESTDIR=").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	stop, rest, _ := strings.Cut(string(out), "\n")
	for _, u := range units {
		if !strings.Contains(stop, "systemctl disable --now ") || !strings.Contains(stop, u.Name()) || !strings.Contains(rest, "/systemd/system/"+u.Name()) {
			t.Errorf("%s: %s", u.Name(), out)
		}
	}
	if lines := strings.Split(strings.TrimSpace(string(out)), "\n"); !strings.Contains(lines[len(lines)-1], "systemctl daemon-reload") {
		t.Errorf("it ends in %q", lines[len(lines)-1])
	}
}
