//go:build linux

package main

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const testPin = "ed25519:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"

const goodConfig = `# a guest
tier = "vm"
broker = ["` + testPin + `"]
deadline = "5m"

[[key]]
name = "disk"
sink = "luks"
device = "/dev/vdb"
mapper = "data"

[[key]]
name = "app"
sink = "keyring"
type = "logon"
optional = true

[[key]]
name = "web"
sink = "file"
path = "/run/keys/web"
length = 64
`

func TestConfig(t *testing.T) {
	c, err := parseConfig("agent.toml", []byte(goodConfig))
	if err != nil {
		t.Fatal(err)
	}
	if c.Tier != "vm" || len(c.Pins) != 1 || c.Pins[0].String() != testPin || c.Deadline != 5*time.Minute || len(c.Keys) != 3 {
		t.Errorf("%+v", c)
	}
	want := []keyConfig{
		{Name: "disk", Sink: "luks", Length: 32, Device: "/dev/vdb", Mapper: "data"},
		{Name: "app", Sink: "keyring", Length: 32, Optional: true, Type: "logon", Description: "keybroker:app", Keyring: "@u"},
		{Name: "web", Sink: "file", Length: 64, Path: "/run/keys/web"},
	}
	if !reflect.DeepEqual(c.Keys, want) {
		t.Errorf("keys %+v", c.Keys)
	}
}

// The example that ships is right, as it stands and with everything in it switched on.
func TestShippedExample(t *testing.T) {
	text, err := os.ReadFile("../../deploy/guest/agent.toml")
	if err != nil {
		t.Fatal(err)
	}
	example := strings.Replace(string(text), "ed25519:REPLACE-WITH-WHAT-KEYBROKER-IDENTITY-PRINTS", testPin, 1)
	if c, err := parseConfig("agent.toml", []byte(example)); err != nil || len(c.Keys) != 1 {
		t.Errorf("as it stands: %v", err)
	}
	for _, name := range []string{"[[key]]", "name", "sink", "type", "description", "keyring", "optional", "path", "length", "subject"} {
		example = strings.ReplaceAll(example, "\n# "+name, "\n"+name)
	}
	if c, err := parseConfig("agent.toml", []byte(example)); err != nil || len(c.Keys) != 3 || c.Subject == "" {
		t.Errorf("with everything in it: %v", err)
	}
}

func TestCmdlineIsLikeTheFile(t *testing.T) {
	line := "BOOT_IMAGE=/vmlinuz quiet keybroker.tier=vm keybroker.broker=" + testPin + " keybroker.deadline=5m" +
		" keybroker.key=disk,luks,/dev/vdb,data keybroker.key=app,keyring,logon,optional keybroker.key=web,file,/run/keys/web,length=64\n"
	fromLine, err := parseCmdline(line)
	if err != nil {
		t.Fatal(err)
	}
	fromFile, err := parseConfig("agent.toml", []byte(goodConfig))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(fromLine, fromFile) {
		t.Errorf("line %+v\nfile %+v", fromLine, fromFile)
	}
	if c, err := parseCmdline(strings.Replace(line, "tier=vm", "tier=snp", 1)); err != nil || c.Tier != "snp" {
		t.Errorf("tier snp: %+v, %v", c, err)
	}
	if c, err := parseCmdline("root=/dev/vda quiet"); c != nil || err != nil {
		t.Errorf("a line that says nothing: %v %v", c, err)
	}
}

func TestConfigErrors(t *testing.T) {
	replace := func(old, new string) string {
		if !strings.Contains(goodConfig, old) {
			t.Fatalf("no %q", old)
		}
		return strings.Replace(goodConfig, old, new, 1)
	}
	cases := []struct{ name, text, want string }{
		{"unknown key", replace(`mapper = "data"`, `maper = "data"`), `agent.toml:10: unknown key "maper" in [[key]]`},
		{"mis-cased key", replace(`device =`, `Device =`), `agent.toml:9: unknown key "Device" in [[key]]`},
		{"unknown table", goodConfig + "[net]\na = 1\n", `agent.toml:23: unknown key "net"`},
		{"unknown top key", "colour = 1\n" + goodConfig, `agent.toml:1: unknown key "colour"`},
		{"repeated key", replace(`sink = "luks"`, "sink = \"luks\"\nsink = \"file\""), "agent.toml:9"},
		{"wrong type", replace(`name = "disk"`, `name = 7`), `agent.toml:7: "name" in [[key]]: expected a string`},
		{"wrong type further down", replace(`name = "web"`, `name = 7`), `agent.toml:19: "name"`},
		{"number in quotes", replace(`length = 64`, `length = "64"`), `agent.toml:22: "length" in [[key]]: expected a whole number`},
		{"broker without a list", replace(`["`+testPin+`"]`, `"`+testPin+`"`), `agent.toml:3: "broker": expected a list`},
		{"unknown key in an inline table", "key = [{name = \"x\", colour = 1}]\n", `agent.toml:1: unknown key "colour" in [[key]]`},
		{"syntax", replace(`tier = "vm"`, `tier = vm`), "agent.toml:2"},
		{"no pin", replace(testPin+`"]`, `"]`), "as `keybroker identity` prints it"},
		{"empty pins", replace(`["`+testPin+`"]`, `[]`), "0 pins"},
		{"pins missing", replace(`broker = ["`+testPin+`"]`, ``), "0 pins"},
		{"a pin twice", replace(testPin+`"]`, testPin+`","`+testPin+`"]`), "twice"},
		{"another tier", replace(`"vm"`, `"container"`), `expected "vm" or "snp"`},
		{"no tier", replace(`tier = "vm"`, ``), `tier ""`},
		{"no deadline", replace(`"5m"`, `"0"`), "never waits for ever"},
		{"endless deadline", replace(`"5m"`, `"9999h"`), "up to 24h"},
		{"subject", "subject = \"WEB1\"\n" + goodConfig, "UUID in lower case"},
		{"a key twice", replace(`name = "app"`, `name = "disk"`), "disk is there twice"},
		{"name", replace(`name = "app"`, `name = "App"`), `name "App"`},
		{"no name", replace(`name = "app"`, ``), `name ""`},
		{"sink", replace(`"keyring"`, `"exec"`), "expected luks, keyring or file"},
		{"device that is none", replace(`/dev/vdb`, `/etc/passwd`), "below /dev"},
		{"device with detours", replace(`/dev/vdb`, `/dev/../etc/x`), "below /dev"},
		{"mapper with a slash", replace(`"data"`, `"../data"`), "mapper"},
		{"mapper like an option", replace(`"data"`, `"--help"`), "mapper"},
		{"field of another sink", replace(`type = "logon"`, "type = \"logon\"\npath = \"/run/x\""), "something else"},
		{"keyring type", replace(`"logon"`, `"trusted"`), "expected user or logon"},
		{"length", replace(`64`, `16`), "expected 32 or 64"},
		{"relative path", replace(`/run/keys/web`, `keys/web`), "absolute path"},
		{"no keys", "tier = \"vm\"\nbroker = [\"" + testPin + "\"]\n", "0 keys"},
		{"two keys in one device", goodConfig + "[[key]]\nname = \"x\"\nsink = \"luks\"\ndevice = \"/dev/vdb\"\nmapper = \"y\"\n", "both go to /dev/vdb"},
		{"two keys in one mapper", goodConfig + "[[key]]\nname = \"x\"\nsink = \"luks\"\ndevice = \"/dev/vdc\"\nmapper = \"data\"\n", "both go to /dev/mapper/data"},
		{"too long", strings.Repeat("#", maxConfig+1), "octets"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			got, err := parseConfig("agent.toml", []byte(c.text))
			if err == nil || got != nil && err == nil {
				t.Fatalf("accepted: %+v", got)
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %q, expected something with %q", err, c.want)
			}
		})
	}
}

func TestCmdlineErrors(t *testing.T) {
	base := "keybroker.tier=vm keybroker.broker=" + testPin + " keybroker.key=disk,luks,/dev/vdb,data"
	for line, want := range map[string]string{
		base + " keybroker.colour=1":                     "unknown",
		base + " keybroker.tier=vm":                      "twice",
		base + " keybroker.key=app":                      "expected NAME",
		base + " keybroker.key=app,exec,/bin/sh":         "unknown",
		base + " keybroker.key=app,luks,/dev/vdc,x,y":    "more arguments",
		base + " keybroker.key=app,luks,/dev/vdc":        "mapper",
		"keybroker.tier=vm":                              "0 pins",
		"keybroker.key=disk,luks,/dev/vdb,data,optional": "tier",
	} {
		c, err := parseCmdline(line)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v and %q, expected something with %q", line, c, err, want)
		}
	}
}

func TestLoadConfig(t *testing.T) {
	dir := t.TempDir()
	file, cmdline := filepath.Join(dir, "agent.toml"), filepath.Join(dir, "cmdline")
	write := func(path, text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	line := "keybroker.tier=vm keybroker.broker=" + testPin + " keybroker.key=disk,luks,/dev/vdb,data"
	write(cmdline, "quiet")
	if _, _, err := loadConfig("", file, cmdline); err == nil || !strings.Contains(err.Error(), "keybroker.tier=") {
		t.Errorf("neither: %v", err)
	}
	write(cmdline, line)
	if c, _, err := loadConfig("", file, cmdline); err != nil || len(c.Keys) != 1 {
		t.Errorf("command line: %v", err)
	}
	write(file, goodConfig)
	if _, _, err := loadConfig("", file, cmdline); err == nil || !strings.Contains(err.Error(), "both") {
		t.Errorf("both: %v", err)
	}
	if c, _, err := loadConfig(file, file, cmdline); err != nil || len(c.Keys) != 3 {
		t.Errorf("both, file named: %v", err)
	}
	write(cmdline, "quiet")
	if c, _, err := loadConfig("", file, cmdline); err != nil || len(c.Keys) != 3 {
		t.Errorf("file: %v", err)
	}
	if _, _, err := loadConfig(filepath.Join(dir, "absent"), file, cmdline); err == nil {
		t.Error("a named file that is not there")
	}
}

// checkParsed: whatever was accepted keeps the promises that the rest of the agent relies on.
func checkParsed(t *testing.T, c *config) {
	if len(c.Pins) == 0 || len(c.Keys) == 0 || c.Deadline <= 0 || c.Deadline > maxDeadline || c.Tier != "vm" && c.Tier != "snp" {
		t.Fatalf("accepted %+v", c)
	}
	for _, k := range c.Keys {
		if k.Length != 32 && k.Length != 64 {
			t.Fatalf("accepted %+v", k)
		}
		switch k.Sink {
		case "luks":
			if !strings.HasPrefix(k.Device, "/dev/") || strings.Contains(k.Device, "..") || strings.ContainsAny(k.Mapper, "/ \n") || k.Mapper == "" || k.Mapper[0] == '-' {
				t.Fatalf("accepted %+v", k)
			}
		case "file":
			if !filepath.IsAbs(k.Path) || filepath.Clean(k.Path) != k.Path {
				t.Fatalf("accepted %+v", k)
			}
		case "keyring":
			if k.Description == "" || k.Keyring == "" {
				t.Fatalf("accepted %+v", k)
			}
		default:
			t.Fatalf("accepted %+v", k)
		}
	}
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(goodConfig))
	f.Add([]byte("tier='vm'\nbroker=['" + testPin + "']\nkey=[{name='a',sink='file',path='/run/a'}]"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := parseConfig("agent.toml", text)
		if err != nil {
			return
		}
		checkParsed(t, c)
	})
}

func FuzzCmdline(f *testing.F) {
	f.Add("keybroker.tier=vm keybroker.broker=" + testPin + " keybroker.key=disk,luks,/dev/vdb,data")
	f.Add("keybroker.tier=vm keybroker.broker=" + testPin + " keybroker.key=app,keyring,user,a:b,@u,optional")
	f.Fuzz(func(t *testing.T, line string) {
		c, err := parseCmdline(line)
		if err != nil || c == nil {
			return
		}
		checkParsed(t, c)
	})
}

// Images often have their configuration as a link.
func TestConfigMayBeALink(t *testing.T) {
	dir := t.TempDir()
	real, link := filepath.Join(dir, "real.toml"), filepath.Join(dir, "agent.toml")
	if err := errors.Join(os.WriteFile(real, []byte("tier"), 0o600), os.Symlink(real, link)); err != nil {
		t.Fatal(err)
	}
	if text, err := readBounded(link, 0); err != nil || string(text) != "tier" {
		t.Errorf("read %q, %v", text, err)
	}
	if _, err := readBounded(link, unix.O_NOFOLLOW); err == nil {
		t.Error("the agent's own state is read through a link")
	}
}
