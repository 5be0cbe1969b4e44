-- Note a version's files before their first byte, so that a crash leaves nothing that nobody would delete.
-- KEYS[1] = state, KEYS[2] = head, KEYS[3] = files begun
-- ARGV[1] = fence, ARGV[2] = version, ARGV[3...] = name, manifest, name, manifest, ...
local head = redis.call('GET', KEYS[2])
if head and tonumber(head) >= tonumber(ARGV[2]) then return {'OLD', head} end
for i = 3, #ARGV, 2 do redis.call('HSET', KEYS[3], ARGV[i], ARGV[i + 1]) end
return {'OK'}
