//go:build linux

package main

import (
	"fmt"
	"slices"
	"strings"
)

const cmdlinePrefix = "keybroker."

// parseCmdline reads the configuration from the kernel's command line, or returns nil where that says nothing of keybroker:
//
//	keybroker.tier=vm|snp keybroker.broker=ed25519:... keybroker.key=disk,luks,/dev/vdb,data
//	keybroker.key=app,keyring,logon[,DESCRIPTION[,KEYRING]]  keybroker.key=web,file,/run/keys/web
//
// broker and key may be there more than once; a key may end in "optional" and "length=64".
func parseCmdline(line string) (*config, error) {
	if len(line) > maxConfig {
		return nil, fmt.Errorf("%d octets, expected at most %d", len(line), maxConfig)
	}
	var raw rawConfig
	seen := map[string]bool{}
	for _, word := range strings.Fields(line) {
		rest, ours := strings.CutPrefix(word, cmdlinePrefix)
		if !ours {
			continue
		}
		name, value, _ := strings.Cut(rest, "=")
		if seen[name] && name != "broker" && name != "key" {
			return nil, fmt.Errorf("%s%s is there twice", cmdlinePrefix, name)
		}
		seen[name] = true
		if err := raw.setWord(name, value); err != nil {
			return nil, fmt.Errorf("%s%s: %w", cmdlinePrefix, name, err)
		}
	}
	if len(seen) == 0 {
		return nil, nil
	}
	return raw.check()
}

func (r *rawConfig) setWord(name, value string) error {
	switch name {
	case "tier":
		r.Tier = value
	case "subject":
		r.Subject = value
	case "deadline":
		r.Deadline = value
	case "broker":
		r.Broker = append(r.Broker, strings.Split(value, ",")...)
	case "key":
		k, err := parseKeyWord(value)
		if err != nil {
			return err
		}
		r.Keys = append(r.Keys, k)
	default:
		return fmt.Errorf("unknown, expected tier, broker, subject, deadline or key")
	}
	return nil
}

// parseKeyWord reads NAME,SINK,ARGUMENTS.
func parseKeyWord(value string) (keyConfig, error) {
	words := strings.Split(value, ",")
	var k keyConfig
	words = slices.DeleteFunc(words, func(w string) bool {
		switch w {
		case "optional":
			k.Optional = true
		case "length=32":
			k.Length = 32
		case "length=64":
			k.Length = 64
		default:
			return false
		}
		return true
	})
	if len(words) < 3 {
		return k, fmt.Errorf("%q, expected NAME,luks,DEVICE,MAPPER or NAME,keyring,TYPE or NAME,file,PATH", value)
	}
	k.Name, k.Sink = words[0], words[1]
	fields := map[string][]*string{
		sinkLUKS:    {&k.Device, &k.Mapper},
		sinkKeyring: {&k.Type, &k.Description, &k.Keyring},
		sinkFile:    {&k.Path},
	}[k.Sink]
	if len(words)-2 > len(fields) {
		return k, fmt.Errorf("%q: the sink is unknown or has more arguments than it takes (%s)", value, sinkFields[k.Sink])
	}
	for i, w := range words[2:] {
		*fields[i] = w
	}
	return k, nil
}
