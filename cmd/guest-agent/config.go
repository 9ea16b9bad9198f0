//go:build linux

package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/BurntSushi/toml"

	"keybroker/derive"
	"keybroker/inject"
	"keybroker/inject/sink"
)

const (
	defaultDeadline = 10 * time.Minute
	maxDeadline     = 24 * time.Hour
	defaultLength   = 32
	maxConfig       = 64 << 10 // octets
	maxPins         = 4
	maxKeys         = inject.MaxWant / 2 // a volume may need its earlier epoch's key too
)

// Sinks by their names in the configuration.
const (
	sinkLUKS    = "luks"
	sinkKeyring = "keyring"
	sinkFile    = "file"
)

// config is what the guest's administrator decides: whom to believe, which keys to ask for, and where each goes.
type config struct {
	Tier     string
	Pins     []inject.Pin
	Subject  string // "": the firmware's UUID where there is one, else the broker's word
	Deadline time.Duration
	Keys     []keyConfig
}

// keyConfig is one [[key]].
type keyConfig struct {
	Name     string `toml:"name"`
	Sink     string `toml:"sink"`
	Length   int    `toml:"length"`
	Optional bool   `toml:"optional"`

	Device string `toml:"device"` // luks
	Mapper string `toml:"mapper"` // luks

	Type        string `toml:"type"`        // keyring
	Description string `toml:"description"` // keyring
	Keyring     string `toml:"keyring"`     // keyring

	Path string `toml:"path"` // file
}

// rawConfig is the file's form.
type rawConfig struct {
	Tier     string      `toml:"tier"`
	Broker   []string    `toml:"broker"`
	Subject  string      `toml:"subject"`
	Deadline string      `toml:"deadline"`
	Keys     []keyConfig `toml:"key"`
}

// configNames are all names that a configuration file may have, in exactly this spelling.
var configNames = []string{
	"tier", "broker", "subject", "deadline", "key",
	"key.name", "key.sink", "key.length", "key.optional", "key.device", "key.mapper",
	"key.type", "key.description", "key.keyring", "key.path",
}

// parseConfig reads agent.toml. Unknown names are errors with their line.
func parseConfig(text []byte) (*config, error) {
	if len(text) > maxConfig {
		return nil, fmt.Errorf("%d octets, expected at most %d", len(text), maxConfig)
	}
	var raw rawConfig
	meta, err := toml.Decode(string(text), &raw)
	if err != nil {
		return nil, tomlError(string(text), err)
	}
	for _, key := range meta.Keys() {
		if !slices.Contains(configNames, strings.Join(key, ".")) {
			return nil, fmt.Errorf("line %d: unknown key %q, expected one of %s", lineOf(string(text), key, anyValue), key.String(), strings.Join(configNames, ", "))
		}
	}
	return raw.check()
}

var wrongTypePattern = regexp.MustCompile(`\(last key "([a-z.]+)"\): incompatible types`)

// tomlError says what is wrong and where. toml itself knows the line of wrong syntax, but not of a wrong type.
func tomlError(text string, err error) error {
	message := strings.TrimPrefix(err.Error(), "toml: ")
	if m := wrongTypePattern.FindStringSubmatch(message); m != nil {
		key := toml.Key(strings.Split(m[1], "."))
		return fmt.Errorf("line %d: %s: expected %s", lineOf(text, key, wrongType(m[1])), m[1], valueForm(m[1]))
	}
	return errors.New(message) // begins with the line
}

// valueForm is how a key's value looks.
func valueForm(key string) string {
	switch key {
	case "key.length":
		return "a number"
	case "key.optional":
		return "true or false"
	case "broker":
		return `a list, as in ["ed25519:..."]`
	case "key":
		return "tables, each begun by [[key]]"
	}
	return "text in quotes"
}

func anyValue(string) bool { return true }

// wrongType says whether a value cannot be of a key's type, by its first character.
func wrongType(key string) func(value string) bool {
	first := map[string]string{"key.length": "0123456789+-", "key.optional": "tf", "broker": "[", "key": "["}[key]
	if first == "" {
		first = `"'`
	}
	return func(value string) bool { return value == "" || !strings.ContainsRune(first, rune(value[0])) }
}

// lineOf finds the line on which a key stands with a value that is meant: toml does not tell the places of keys.
func lineOf(text string, key toml.Key, meant func(value string) bool) int {
	name, parent := key[len(key)-1], strings.Join(key[:len(key)-1], ".")
	table := ""
	for n, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			table = strings.Trim(strings.SplitN(line, "#", 2)[0], "[] \t")
			if table == key.String() && meant("") {
				return n + 1
			}
			continue
		}
		word, value, _ := strings.Cut(line, "=")
		word = strings.Trim(strings.TrimSpace(word), `"'`)
		if (word == name && table == parent || word == key.String()) && meant(strings.TrimSpace(value)) {
			return n + 1
		}
	}
	return 1 + max(0, strings.Count(text[:max(0, strings.Index(text, name))], "\n")) // inline tables: where it is first named
}

var mapperPattern = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$`)

// check holds a configuration to its rules and fills in what may be left out.
func (r *rawConfig) check() (*config, error) {
	c := &config{Tier: r.Tier, Subject: r.Subject, Deadline: defaultDeadline, Keys: r.Keys}
	if c.Tier != inject.TierVM {
		return nil, fmt.Errorf("tier %q, expected %q", r.Tier, inject.TierVM)
	}
	if c.Subject != "" && derive.CheckSubject(c.Subject) != nil {
		return nil, fmt.Errorf("subject %q, expected this domain's UUID in lower case, or nothing", c.Subject)
	}
	if err := c.setPins(r.Broker); err != nil {
		return nil, err
	}
	if err := c.setDeadline(r.Deadline); err != nil {
		return nil, err
	}
	return c, c.setKeys()
}

func (c *config) setPins(broker []string) error {
	if len(broker) == 0 || len(broker) > maxPins {
		return fmt.Errorf("%d pins in broker, expected 1 to %d: `keybroker identity` on the host prints the broker's", len(broker), maxPins)
	}
	for _, text := range broker {
		pin, err := inject.ParsePin(text)
		if err != nil {
			return fmt.Errorf("broker: %w", err)
		}
		if slices.Contains(c.Pins, pin) {
			return fmt.Errorf("broker: %v is there twice", pin)
		}
		c.Pins = append(c.Pins, pin)
	}
	return nil
}

func (c *config) setDeadline(text string) error {
	if text == "" {
		return nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 || d > maxDeadline {
		return fmt.Errorf("deadline %q, expected a time above 0 and up to 24h, as in 5m: the agent never waits for ever", text)
	}
	c.Deadline = d
	return nil
}

func (c *config) setKeys() error {
	if len(c.Keys) == 0 || len(c.Keys) > maxKeys {
		return fmt.Errorf("%d keys, expected 1 to %d", len(c.Keys), maxKeys)
	}
	names, places := map[string]bool{}, map[string]string{}
	for i := range c.Keys {
		k := &c.Keys[i]
		if derive.CheckServiceName(k.Name) != nil {
			return fmt.Errorf("key %d: name %q, expected 1 to 63 of a-z, 0-9, dot and dash", i+1, k.Name)
		}
		if names[k.Name] {
			return fmt.Errorf("key %s is there twice", k.Name)
		}
		names[k.Name] = true
		if err := k.check(); err != nil {
			return fmt.Errorf("key %s: %w", k.Name, err)
		}
		for _, p := range k.places() {
			if other := places[p]; other != "" {
				return fmt.Errorf("keys %s and %s both go to %s", other, k.Name, p)
			}
			places[p] = k.Name
		}
	}
	return nil
}

// check fills in defaults and refuses what its sink has no use for.
func (k *keyConfig) check() error {
	if k.Length == 0 {
		k.Length = defaultLength
	}
	if k.Length != 32 && k.Length != 64 {
		return fmt.Errorf("length %d, expected 32 or 64 octets", k.Length)
	}
	switch k.Sink {
	case sinkLUKS:
		return errors.Join(k.none(sinkLUKS, k.Type, k.Description, k.Keyring, k.Path), k.checkLUKS())
	case sinkKeyring:
		k.keyringDefaults()
		return errors.Join(k.none(sinkKeyring, k.Device, k.Mapper, k.Path), k.keyring().Check())
	case sinkFile:
		return errors.Join(k.none(sinkFile, k.Device, k.Mapper, k.Type, k.Description, k.Keyring), k.checkFile())
	}
	return fmt.Errorf("sink %q, expected luks, keyring or file", k.Sink)
}

func (k *keyConfig) none(sink string, others ...string) error {
	if slices.ContainsFunc(others, func(s string) bool { return s != "" }) {
		return fmt.Errorf("the sink %s takes %s, and something else is given", sink, sinkFields[sink])
	}
	return nil
}

var sinkFields = map[string]string{
	sinkLUKS:    "device and mapper",
	sinkKeyring: "type, description and keyring",
	sinkFile:    "path",
}

func (k *keyConfig) checkLUKS() error {
	if !cleanPath(k.Device) || !strings.HasPrefix(k.Device, "/dev/") {
		return fmt.Errorf("device %q, expected a path below /dev, as in /dev/vdb or /dev/disk/by-id/virtio-data", k.Device)
	}
	if !mapperPattern.MatchString(k.Mapper) || k.Mapper == "control" {
		return fmt.Errorf("mapper %q, expected a name of letters, digits, dot, dash and underscore: the volume appears below /dev/mapper", k.Mapper)
	}
	return nil
}

func (k *keyConfig) checkFile() error {
	if !cleanPath(k.Path) || len(filepath.Base(k.Path)) > 200 {
		return fmt.Errorf("path %q, expected an absolute path on a tmpfs, as in /run/keys/app", k.Path)
	}
	return nil
}

// cleanPath wants an absolute path with no detours and nothing that does not print.
func cleanPath(p string) bool {
	odd := func(r rune) bool { return r <= ' ' || r == 0x7f || r == utf8.RuneError }
	return filepath.IsAbs(p) && filepath.Clean(p) == p && p != "/" && len(p) < 4096 && !strings.ContainsFunc(p, odd)
}

func (k *keyConfig) keyringDefaults() {
	if k.Description == "" {
		k.Description = "keybroker:" + k.Name
	}
	if k.Keyring == "" {
		k.Keyring = "@u"
	}
}

func (k *keyConfig) keyring() *sink.Keyring {
	return &sink.Keyring{Type: k.Type, Description: k.Description, Ring: k.Keyring}
}

// places are what no two keys may share.
func (k *keyConfig) places() []string {
	switch k.Sink {
	case sinkLUKS:
		return []string{k.Device, "/dev/mapper/" + k.Mapper}
	case sinkKeyring:
		return []string{k.Keyring + " " + k.Type + " " + k.Description}
	}
	return []string{k.Path}
}

// place names the sink for people, and tells whether a record of an earlier run is of this configuration.
func (k *keyConfig) place() string { return k.Sink + " " + strings.Join(k.places(), " as ") }
